"""The tensors of a checkpoint folder, by name, without reading them.

Only safetensors files are read. The index file is checked against the files' headers, and files that it leaves out
(``mtp.safetensors`` of some re-quantized checkpoints) are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nextn.checkpoint.header import TensorInfo, check_link, read_header
from nextn.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"

MAX_OPEN_FILES = 2


class TensorReader(Protocol):
    """Reads a tensor, or some of its rows and columns (None: all)."""

    def __call__(self, name: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of the folder. unlisted: files that the index file does not name (all listed without one)."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    unlisted: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path, needed: str = "") -> CheckpointIndex:
        """Read the headers.

        needed: what the names of the tensors begin with that must be there; files that only have others may be absent
        Raises CheckpointError for corrupt or missing files, a tensor in two files, or weights in another format.
        """
        files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
        listed = read_index(folder)
        named = set(listed.values()) if listed else {file.name for file in files}
        absent = named - {file.name for file in files}
        for name, file_name in listed.items():
            if file_name in absent and name.startswith(needed):
                raise CheckpointError(
                    f"{folder / INDEX_NAME}: names {file_name}, which is not in the folder; download it"
                )
        if not files:
            raise CheckpointError(_explain_no_files(folder))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            _check_downloaded(file)
            for name, info in read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{name}: is in both {tensors[name].file.name} and {file.name}; remove one of the two"
                    )
                tensors[name] = info
        for name, file_name in listed.items():
            if file_name in absent:
                continue
            if name not in tensors:
                raise CheckpointError(f"{name}: listed in {INDEX_NAME} but not in {file_name}; download the file again")
            if tensors[name].file.name != file_name:
                raise CheckpointError(
                    f"{name}: {INDEX_NAME} says {file_name}, but it is in {tensors[name].file.name}; correct the index"
                )
        return cls(folder, tensors, tuple(file.name for file in files if file.name not in named))

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: info.dtype for name, info in self.tensors.items()}

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """A function that reads one tensor, or a part, and nothing else.

        Never more than MAX_OPEN_FILES are mapped into memory, the latest used; ask for tensors file by file.
        """
        from safetensors import SafetensorError, safe_open

        handles: dict[Path, tuple[Any, ExitStack]] = {}

        def handle_of(file: Path) -> Any:
            if file not in handles:
                if len(handles) == MAX_OPEN_FILES:
                    handles.pop(next(iter(handles)))[1].close()
                stack = ExitStack()
                handles[file] = (stack.enter_context(safe_open(file, framework="pt")), stack)
            handles[file] = handles.pop(file)  # now the latest
            return handles[file][0]

        def read(name: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor:
            info = self.tensors[name]
            try:
                file = handle_of(info.file)
                tensor: torch.Tensor = (
                    file.get_tensor(name)
                    if rows is None and columns is None
                    else file.get_slice(name)[tuple(map(_slice, (rows, columns)))[: len(info.shape)]]
                )
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{info.file}: {name} cannot be read ({error}); download it again") from None
            return tensor

        try:
            yield read
        finally:
            for _, stack in handles.values():
                stack.close()


def _slice(part: range | None) -> slice:
    return slice(None) if part is None else slice(part.start, part.stop)


def _check_downloaded(file: Path) -> None:
    """aria2 gives a file its size at first, and keeps a file beside it that says what is still to come."""
    control = file.with_name(f"{file.name}.aria2")
    if control.exists():
        raise CheckpointError(
            f"{file}: its download has not ended, as {control.name} beside it says; let aria2c go on, or download it "
            "again and remove that file"
        )


def read_index(folder: Path) -> dict[str, str]:
    """The weight map of the index file; empty without one."""
    path = folder / INDEX_NAME
    check_link(path)
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); download it again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and "/" not in v for v in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map: expected tensor names mapped to names of files in the folder")
    return weight_map


def _explain_no_files(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: has weights in pickle format ({pickled[0]}), which can run code when loaded and is never read; "
            "convert them to safetensors"
        )
    return f"{folder}: has no *.safetensors files; give a folder with a checkpoint, or --load-format dummy"
