"""The tensors of a checkpoint folder, by name, without reading them.

Only safetensors files are read. The index file is checked against the files' headers, and files that it leaves out
(``mtp.safetensors`` of some re-quantized checkpoints) are read as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from nextn.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype: safetensors name such as "BF16", "F32", "F8_E4M3"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorReader(Protocol):
    def __call__(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of the folder."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> CheckpointIndex:
        """Read the headers.

        Raises CheckpointError for corrupt or missing files, a tensor in two files, or weights in another format.
        """
        files = sorted(folder.glob("*.safetensors"))
        listed = _read_index(folder)
        for name in sorted(set(listed.values())):
            if folder / name not in files:
                raise CheckpointError(f"{folder / INDEX_NAME}: names {name}, which is not in the folder; download it")
        if not files:
            raise CheckpointError(_explain_no_files(folder))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{name}: is in both {tensors[name].file.name} and {file.name}; remove one of the two"
                    )
                tensors[name] = info
        for name, file_name in listed.items():
            if name not in tensors:
                raise CheckpointError(f"{name}: listed in {INDEX_NAME} but not in {file_name}; download the file again")
            if tensors[name].file.name != file_name:
                raise CheckpointError(
                    f"{name}: {INDEX_NAME} says {file_name}, but it is in {tensors[name].file.name}; correct the index"
                )
        return cls(folder, tensors)

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: info.dtype for name, info in self.tensors.items()}

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """A function that reads one tensor by name; each file is opened once, and only what is asked for is read."""
        with ExitStack() as stack:
            handles: dict[Path, safe_open] = {}

            def read(name: str) -> torch.Tensor:
                info = self.tensors[name]
                if info.file not in handles:
                    handles[info.file] = stack.enter_context(safe_open(info.file, framework="pt"))
                tensor: torch.Tensor = handles[info.file].get_tensor(name)
                return tensor

            yield read


def _read_index(folder: Path) -> dict[str, str]:
    """The weight map of the index file; empty without one."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); download it again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and "/" not in v for v in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map: expected tensor names mapped to names of files in the folder")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of a safetensors file (safetensors format specification)."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"the header says {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
        raise CheckpointError(f"{file}: is not a safetensors file ({error}); download it again") from None
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: has {size} bytes, its header asks for {8 + length + end}; download it again")
    return found


def _explain_no_files(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: has weights in pickle format ({pickled[0]}), which can run code when loaded and is never read; "
            "convert them to safetensors"
        )
    return f"{folder}: has no *.safetensors files; give a folder with a checkpoint, or --load-format dummy"
