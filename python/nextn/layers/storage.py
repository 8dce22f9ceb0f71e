"""How a (possibly fused) linear's shards lie in one tensor, and their scales in another.

The names are those of the checkpoint; each slot is a view of the storage with exactly the shape of the checkpoint
tensor, or of the part of it that this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nextn.kernels import gpu
from nextn.kernels.fp8_dequantize import dequantize
from nextn.kernels.linear import Weight, pack_weight, store_weight
from nextn.quantization.scheme import LinearScheme


@dataclass(frozen=True)
class Part:
    """The rows and columns of a checkpoint tensor that this rank holds; None is all of them."""

    rows: range | None = None
    columns: range | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the part."""
        if self.rows is not None:
            tensor = tensor[self.rows.start : self.rows.stop]
        return tensor if self.columns is None else tensor[:, self.columns.start : self.columns.stop]

    def blocks(self, block: tuple[int, int]) -> Part:
        """The same of a tensor with one element per block. The part begins where a block does."""
        return Part(_blocks(self.rows, block[0]), _blocks(self.columns, block[1]))


WHOLE = Part()


class Slot(NamedTuple):
    """A checkpoint tensor's name, the storage to fill, and the part of the tensor that belongs there."""

    name: str
    view: torch.Tensor
    part: Part = WHOLE


@dataclass(frozen=True)
class Shard:
    """One checkpoint module of a fused linear: its name, its output rows here, and the part of its weight they are."""

    name: str
    num_rows: int
    part: Part = WHOLE

    @classmethod
    def of_rows(cls, name: str, rows: range) -> Shard:
        """Some output rows of the module."""
        return cls(name, len(rows), Part(rows=rows))

    @classmethod
    def of_columns(cls, name: str, num_rows: int, columns: range) -> Shard:
        """All output rows, over some of the inputs: a term of the module's output."""
        return cls(name, num_rows, Part(columns=columns))


@dataclass(frozen=True)
class ScaleStorage:
    """Scales of a linear, by shard.

    weight_scale: [rows, 1] per channel, [num_shards, 1] per tensor, or all shards' block rows [·, ⌈K / block_k⌉]
    input_scale: [num_shards] float32 where activations have a static scale
    """

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None


def make_weight(shards: Sequence[Shard], in_features: int, scheme: LinearScheme, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised storage [rows, in_features], FP8 codes or ``dtype``."""
    rows = sum(shard.num_rows for shard in shards)
    return torch.empty(rows, in_features, dtype=torch.float8_e4m3fn if scheme.is_quantized else dtype)


def make_scales(shards: Sequence[Shard], in_features: int, scheme: LinearScheme) -> ScaleStorage | None:
    """Uninitialised storage for the scales; None where there are none."""
    if not scheme.is_quantized:
        return None
    rows = sum(_scale_rows(shard, scheme) for shard in shards)
    columns = -(-in_features // scheme.block[1]) if scheme.block else 1
    static = scheme.activation == "static_tensor"
    return ScaleStorage(torch.empty(rows, columns), torch.empty(len(shards)) if static else None)


def weight_slots(
    shards: Sequence[Shard], scheme: LinearScheme, weight: torch.Tensor, scales: ScaleStorage | None
) -> Iterator[Slot]:
    """The slots of every shard's weight and scales."""
    row = scale_row = 0
    for i, shard in enumerate(shards):
        yield Slot(f"{shard.name}.weight", weight[row : row + shard.num_rows], shard.part)
        row += shard.num_rows
        if scales is None:
            continue
        end = scale_row + _scale_rows(shard, scheme)
        view = scales.weight_scale[scale_row:end]
        view = view[0] if scheme.kind == "fp8_tensor" else view
        yield Slot(f"{shard.name}.{scheme.scale_suffix}", view, _scale_part(shard, scheme))
        scale_row = end
        if scales.input_scale is not None:
            yield Slot(f"{shard.name}.input_scale", scales.input_scale[i : i + 1])


def expand(
    shards: Sequence[Shard],
    scheme: LinearScheme,
    weight: torch.Tensor,
    scales: ScaleStorage | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dequantized weight [rows, in_features] in ``dtype``."""
    if scales is None:
        return weight.to(dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    row = scale_row = 0
    for shard in shards:
        rows, scale_end = slice(row, row + shard.num_rows), scale_row + _scale_rows(shard, scheme)
        out[rows] = dequantize(weight[rows], scales.weight_scale[scale_row:scale_end], scheme.block)
        row, scale_row = rows.stop, scale_end
    return out


def pack(
    shards: Sequence[Shard],
    scheme: LinearScheme,
    weight: torch.Tensor,
    scales: ScaleStorage | None,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Weight:
    """The weight ready to multiply.

    On a GPU it stays as it is stored. On a CPU it is dequantized, and beside that FP8 where a scale per row says all.
    """
    if gpu.suits(weight):
        return store_weight(
            weight,
            bias,
            *stored_scale(shards, scheme, scales),
            batch_invariant=batch_invariant,
            quantizes_input=scheme.quantizes_input,
        )
    expanded = expand(shards, scheme, weight, scales, dtype)
    if scales is None or scheme.kind == "fp8_block":
        return pack_weight(expanded, bias)
    per_row, _ = stored_scale(shards, scheme, scales)
    assert per_row is not None, "there are scales"
    return pack_weight(expanded, bias, codes=weight, scale=per_row.view(-1))


def stored_scale(
    shards: Sequence[Shard], scheme: LinearScheme, scales: ScaleStorage | None
) -> tuple[torch.Tensor | None, tuple[int, int] | None]:
    """The scales of a fused weight, of all its shards alike, and the block that each belongs to.

    Returns a scale per row [rows, 1], or per block [⌈rows / block_n⌉, ⌈in_features / block_k⌉]; None twice without.
    """
    scale, block = shard_scale(shards, scheme, scales)
    sizes = [shard.num_rows for shard in shards]
    if scale is None or block is None or all(size % block[0] == 0 for size in sizes[:-1]):
        return scale, block
    return _by_row(scale, sizes, block[0]), (1, block[1])  # a shard begins inside another's block


def shard_scale(
    shards: Sequence[Shard], scheme: LinearScheme, scales: ScaleStorage | None
) -> tuple[torch.Tensor | None, tuple[int, int] | None]:
    """As ``stored_scale``, with every shard's first block beginning where the shard does."""
    if scales is None:
        return None, None
    if scheme.kind == "fp8_tensor":
        return _by_row(scales.weight_scale, [shard.num_rows for shard in shards], 0), None
    return scales.weight_scale, scheme.block


def _by_row(scale: torch.Tensor, sizes: Sequence[int], block_rows: int) -> torch.Tensor:
    """A row of scales per row of the weight, from one per block_rows of each shard; 0 is one for the whole shard."""
    parts, first = [], 0
    for size in sizes:
        end = first + (-(-size // block_rows) if block_rows else 1)
        parts.append(scale[first:end].repeat_interleave(block_rows or size, 0)[:size])
        first = end
    return torch.cat(parts)


def _scale_part(shard: Shard, scheme: LinearScheme) -> Part:
    """Of the scales, what belongs to the shard's part of the weight: scales per row are those of all its inputs."""
    if scheme.block is not None:
        return shard.part.blocks(scheme.block)
    return Part(rows=shard.part.rows) if scheme.kind == "fp8_channel" else WHOLE


def _blocks(part: range | None, size: int) -> range | None:
    if part is None:
        return None
    assert part.start % size == 0, f"{part} begins inside a block of {size}"
    return range(part.start // size, -(-part.stop // size))


def _scale_rows(shard: Shard, scheme: LinearScheme) -> int:
    match scheme.kind:
        case "fp8_channel":
            return shard.num_rows
        case "fp8_tensor":
            return 1
        case "fp8_block":
            assert scheme.block is not None, "a block scheme has a block"
            return -(-shard.num_rows // scheme.block[0])
        case "unquantized":
            return 0
