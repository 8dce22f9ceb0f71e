"""x Wᵀ + b.

Floor: the weight's bytes, read once, until M reaches a few rows; then 2 · M · N · K FLOPs. On a GPU weights stay as the
checkpoint stores them. On a CPU the compiled kernel keeps FP8 codes and bfloat16 values as they are, so that a small
model stays in its cache; torch multiplies float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from nextn.kernels import gpu, native
from nextn.kernels.fp8_quantize import quantize_per_group, quantize_per_token
from nextn.kernels.matmul import matmul
from nextn.kernels.matmul_config import MAX_TILES

MAX_NATIVE_ELEMENTS = 4 * 2**20
"""Larger weights are left to torch, which shares a product among all cores."""

PANEL = 64
_FLOAT32, _BFLOAT16, _FP8 = 0, 1, 2


@dataclass(frozen=True)
class PackedWeight:
    """A linear's weight, ready to multiply.

    weight: [N, K] in the computing type; transposed: a view of it, [K, N]; bias: [N] or None
    panels, scales, biases: what the compiled kernel reads (cpu/kernels.inc); None where it does not serve the weight
    descriptor: int64 addresses and sizes of those, as the kernel's Weight
    address: of the descriptor; 0 where the compiled kernel does not serve the weight
    num_rows: N
    """

    weight: torch.Tensor
    transposed: torch.Tensor
    bias: torch.Tensor | None
    panels: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    biases: torch.Tensor | None = None
    descriptor: torch.Tensor | None = None
    address: int = 0

    @cached_property
    def num_rows(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class InputFormat:
    """FP8 activations with a scale per token, or per token and group of ``group_size`` columns."""

    group_size: int | None


@dataclass(frozen=True)
class Rows:
    """Activations on their way into a product, from a kernel that has quantized them in the same pass.

    q: [M, K] float8_e4m3fn and scale: [M, 1] or [M, ⌈K / group_size⌉] float32
    wide: [M, K], the same before; None where nobody reads it
    dtype: the computing type
    """

    q: torch.Tensor
    scale: torch.Tensor
    wide: torch.Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredWeight:
    """A linear's weight on a GPU, as the checkpoint stores it.

    weight: [N, K] float8_e4m3fn, or the computing type; bias: [N] or None
    scale: [N, 1], or with ``block`` [⌈N / block_n⌉, ⌈K / block_k⌉] float32; None where the weight is not quantized
    quantizes_input: whether activations are quantized too: per token, or per group of block_k
    batch_invariant: sum in an order that does not depend on the number of rows
    counters: what products that split K count with (see ``split_k``)
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    block: tuple[int, int] | None
    quantizes_input: bool
    batch_invariant: bool
    counters: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.weight.shape[0]

    @property
    def input_format(self) -> InputFormat | None:
        """How its activations should come; None for wide."""
        return InputFormat(None if self.block is None else self.block[1]) if self.quantizes_input else None


def store_weight(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    *,
    batch_invariant: bool,
    quantizes_input: bool = True,
) -> StoredWeight:
    """Prepare a weight on a GPU for ``linear``; arguments as StoredWeight's; only cards with FP8 units quantize."""
    return StoredWeight(
        weight,
        bias,
        scale,
        block,
        quantizes_input=quantizes_input and scale is not None and gpu.has_fp8_units(weight.device),
        batch_invariant=batch_invariant,
        counters=torch.zeros(MAX_TILES, dtype=torch.int32, device=weight.device),
    )


def pack_weight(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> PackedWeight:
    """Prepare a weight for ``linear``.

    weight: [N, K]; bias: [N]
    codes: [N, K] float8_e4m3fn and scale: [N] float32, of which ``weight`` is the product, where it was stored so
    """
    bare = PackedWeight(weight, weight.t(), bias)
    if not native.suits(weight) or weight.numel() > MAX_NATIVE_ELEMENTS:
        return bare
    if codes is not None:
        panels, kind = _panels(codes.view(torch.uint8), (4, 16), (0, 3, 2, 1)), _FP8
    elif torch.equal(weight.bfloat16().float(), weight):
        # [P, vector, half, lane, K] → [P, K, vector, lane, half]
        panels, kind = _panels(weight.bfloat16(), (2, 2, 16), (0, 4, 1, 3, 2)), _BFLOAT16
    else:
        panels, kind = _panels(weight, (PANEL,), (0, 2, 1)), _FLOAT32
    scales = None if codes is None or scale is None else _padded(scale.float())
    biases = None if bias is None else _padded(bias.float())
    return _described(PackedWeight(weight, weight.t(), bias, panels, scales, biases), kind)


def rows_from(packed: Weight, first: int) -> Weight:
    """The output rows from ``first`` on, of the same memory."""
    if isinstance(packed, StoredWeight):
        return _stored_rows_from(packed, first)
    weight, bias = packed.weight[first:], None if packed.bias is None else packed.bias[first:]
    if packed.panels is None or packed.descriptor is None or first % PANEL:
        return PackedWeight(weight, weight.t(), bias)
    panels = packed.panels[first // PANEL :]
    scales, biases = (None if row is None else row[first:] for row in (packed.scales, packed.biases))
    return _described(PackedWeight(weight, weight.t(), bias, panels, scales, biases), int(packed.descriptor[-1]))


def _stored_rows_from(stored: StoredWeight, first: int) -> StoredWeight:
    scale, block = stored.scale, stored.block
    if scale is not None and block is not None and first % block[0]:
        scale, block = scale.repeat_interleave(block[0], 0)[: stored.num_rows], (1, block[1])
    if scale is not None:
        scale = scale[first // (1 if block is None else block[0]) :]
    bias = None if stored.bias is None else stored.bias[first:]
    return replace(stored, weight=stored.weight[first:], bias=bias, scale=scale, block=block)


def _described(packed: PackedWeight, kind: int) -> PackedWeight:
    """With the kernel's descriptor; kind: how the panels are stored."""
    addresses = [0 if t is None else t.data_ptr() for t in (packed.panels, packed.scales, packed.biases)]
    descriptor = torch.tensor([*addresses, *packed.weight.shape, kind])
    return replace(packed, descriptor=descriptor, address=descriptor.data_ptr())


def _panels(weight: torch.Tensor, columns: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """[N, K] → panels of 64 output columns, which ``columns`` divides, in the order the kernel reads them."""
    padded = weight.new_zeros(-(-weight.shape[0] // PANEL) * PANEL, weight.shape[1])
    padded[: weight.shape[0]] = weight
    return padded.view(-1, *columns, weight.shape[1]).permute(order).contiguous()


def _padded(row: torch.Tensor) -> torch.Tensor:
    return F.pad(row, (0, -row.numel() % PANEL)).contiguous()


Weight = PackedWeight | StoredWeight


def linear(
    x: torch.Tensor | Rows, weight: Weight, residual: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x Wᵀ + b (+ residual).

    x: [M, K]; residual: [M, N] or None
    Returns [M, N] in out_dtype, None for x's dtype.
    """
    if isinstance(weight, StoredWeight):
        return _stored(x, weight, residual, out_dtype)
    assert isinstance(x, torch.Tensor), "nothing quantizes for a packed weight"
    if weight.address and native.cpu is not None and native.suits(x):
        out = x.new_empty(x.shape[0], weight.num_rows)
        added = 0 if residual is None else residual.data_ptr()
        native.cpu.linear(weight.address, x.data_ptr(), x.shape[0], added, out.data_ptr())
        return out
    product = F.linear(x, weight.weight, weight.bias)
    product = product if residual is None else product + residual
    return product if out_dtype is None else product.to(out_dtype)


def _stored(
    x: torch.Tensor | Rows, weight: StoredWeight, residual: torch.Tensor | None, out_dtype: torch.dtype | None
) -> torch.Tensor:
    out_dtype = x.dtype if out_dtype is None else out_dtype
    values, scale = _operand(x, weight)
    if weight.scale is None and out_dtype == values.dtype and not weight.batch_invariant:  # cuBLAS
        product = F.linear(values, weight.weight, weight.bias)
        return product if residual is None else product + residual
    return matmul(
        values,
        scale,
        weight.weight,
        weight.scale,
        weight.block,
        weight.bias,
        residual,
        out_dtype=out_dtype,
        counters=weight.counters,
        batch_invariant=weight.batch_invariant,
    )


def _operand(x: torch.Tensor | Rows, weight: StoredWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x as the product takes it, and its scale where it is quantized."""
    if isinstance(x, Rows) and weight.quantizes_input and _suits(x, weight):
        return x.q, x.scale
    wide = x.wide if isinstance(x, Rows) else x
    assert wide is not None, "the weight wants its input wide, or quantized in another way"
    if not weight.quantizes_input:
        return wide, None
    return quantize_per_token(wide) if weight.block is None else quantize_per_group(wide, weight.block[1])


def _suits(x: Rows, weight: StoredWeight) -> bool:
    """Whether x has a scale for each of the weight's blocks. A weight with scales per channel takes any."""
    return weight.block is None or (weight.scale is not None and x.scale.shape[1] == weight.scale.shape[1])
