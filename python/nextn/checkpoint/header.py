"""The header of a safetensors file: names, types, shapes and places of its tensors (the format's specification)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextn.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype: safetensors name such as "BF16", "F32", "F8_E4M3"; start: where the bytes begin in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, by name, without reading one.

    Raises CheckpointError if the file is no safetensors file, is cut off, or names a tensor twice.
    """
    check_link(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"the header says {length} bytes, the file has {size}")
            header = json.loads(stream.read(length).decode(), object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds something other than text")
        "".join(header).encode()  # raises ValueError for half a surrogate pair, which is no text
        found = {name: _tensor(name, entry, file, 8 + length) for name, entry in header.items()}
        end = _end(found, 8 + length)
    except _Repeated as error:
        raise CheckpointError(
            f"{error.args[0]}: is twice in {file}; write the file again with one of the two"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error, OSError) as error:
        raise CheckpointError(f"{file}: is not a safetensors file ({error}); download it again") from None
    if end != size:
        raise CheckpointError(f"{file}: has {size} bytes, its header asks for {end}; download it again")
    return found


def check_link(file: Path) -> None:
    """Raises CheckpointError if the file is a link to nothing, as the hub's cache has where a download has ended."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file}: is a link to {file.readlink()}, which does not exist; download it again, to the end"
        )


class _Repeated(Exception):
    """A name stands twice in one object; a plain JSON reader would keep the last and say nothing."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in names if names.count(name) > 1))
    return found


def _tensor(name: str, entry: Mapping[str, Any], file: Path, data_start: int) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: dtype {dtype!r}, shape {shape}, data_offsets {[begin, end]}")
    item = ITEM_BYTES.get(dtype)
    if item is not None and end - begin != item * math.prod(shape):
        raise ValueError(f"{name}: {dtype} of shape {shape} does not take the {end - begin} bytes it is given")
    return TensorInfo(file, dtype, shape, data_start + begin, end - begin)


def _end(tensors: Mapping[str, TensorInfo], data_start: int) -> int:
    """Where the last tensor ends; the format allows neither gaps nor overlaps."""
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            raise ValueError(f"{name}: begins at byte {info.start}, but the tensor before it ends at {end}")
        end += info.num_bytes
    return end
