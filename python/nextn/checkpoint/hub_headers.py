"""The configs and headers of a checkpoint on the hub, without its weights: megabytes instead of hundreds of GB."""

from __future__ import annotations

import fnmatch
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from nextn.checkpoint.header import MAX_HEADER_BYTES
from nextn.checkpoint.hub import PATTERNS, local_folder
from nextn.checkpoint.index import INDEX_NAME
from nextn.errors import CheckpointError

CONFIGS = ("config.json", "generation_config.json", "hf_quant_config.json", INDEX_NAME)
PICKLES = ("*.bin", "*.pt", "*.pth")
FIRST_BYTES = 2**20
"""Read of each file at first; most headers fit."""


class FileSystem(Protocol):
    """The part of fsspec's file systems that is used."""

    def ls(self, path: str, detail: bool = ...) -> list[dict[str, object]]: ...

    def cat_file(self, path: str, start: int | None = ..., end: int | None = ...) -> bytes: ...


@contextmanager
def folder_with_headers(name: str, flag: str) -> Iterator[Path]:
    """A folder as it is; of a hub name, one with its configs and with safetensors files that are headers and holes.

    flag: what the name was given with, for messages
    Raises CheckpointError as resolve_model does. Where the hub cannot be reached, what is in the local cache is used;
    weights are never downloaded.
    """
    found = local_folder(name, flag)
    if found is not None:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="nextn-doctor-") as place:
        folder = Path(place) / name.replace("/", "--")
        yield _fetch(name, folder, flag)


def _fetch(name: str, folder: Path, flag: str) -> Path:
    """Copy headers from the hub into the folder, or find the checkpoint in the local cache.

    HTTPError is the one of httpx or of httpx2: huggingface_hub has had both.
    """
    from huggingface_hub import HfFileSystem, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        copy_headers(HfFileSystem(), name, folder)
        return folder
    except (OSError, HTTPError, HFValidationError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise CheckpointError(
            f"{flag} {name}: no such folder, not in the local cache, and not to be had from the hub ({reason}); check "
            "the name and the network, or download the model and give its folder"
        ) from None


def copy_headers(files: FileSystem, source: str, folder: Path) -> None:
    """Write what the doctor needs of ``source`` into ``folder``: weights become holes that take no disk.

    Pickles become empty files: their names are all that is ever wanted of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in files.ls(source, detail=True):
        path = str(entry["name"])
        name = path.rpartition("/")[2]
        if name in CONFIGS:
            (folder / name).write_bytes(files.cat_file(path))
        elif name.endswith(".safetensors"):
            size = entry["size"]
            assert isinstance(size, int), "files have a size"
            _write_hole(folder / name, _header_bytes(files, path, size), size)
        elif any(fnmatch.fnmatch(name, pattern) for pattern in PICKLES):
            (folder / name).touch()


def _header_bytes(files: FileSystem, path: str, size: int) -> bytes:
    """The length and the header; what is no safetensors file is left to the reader of headers to refuse."""
    start = files.cat_file(path, 0, min(size, FIRST_BYTES))
    if len(start) < 8:
        return start
    (length,) = struct.unpack("<Q", start[:8])
    end = 8 + min(length, MAX_HEADER_BYTES, size - 8)
    if end > len(start):
        start += files.cat_file(path, len(start), end)
    return start[:end]


def _write_hole(file: Path, header: bytes, size: int) -> None:
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
