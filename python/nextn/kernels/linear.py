"""x Wᵀ + b.

Floor: the weight's bytes, read once, until M reaches a few rows; then 2 · M · N · K FLOPs. The compiled kernel keeps
FP8 codes and bfloat16 values as they are, so that a small model stays in a CPU's cache; torch multiplies float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from nextn.kernels import native

MAX_NATIVE_ELEMENTS = 4 * 2**20
"""Larger weights are left to torch, which shares a product among all cores."""

PANEL = 64
_FLOAT32, _BFLOAT16, _FP8 = 0, 1, 2


@dataclass(frozen=True)
class PackedWeight:
    """A linear's weight, ready to multiply.

    weight: [N, K] in the computing type; transposed: a view of it, [K, N]; bias: [N] or None
    panels, scales, biases: what the compiled kernel reads (see cpu_kernels.c); None where it does not serve the weight
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


def rows_from(packed: PackedWeight, first: int) -> PackedWeight:
    """The output rows from ``first`` on, of the same memory."""
    weight, bias = packed.weight[first:], None if packed.bias is None else packed.bias[first:]
    if packed.panels is None or packed.descriptor is None or first % PANEL:
        return PackedWeight(weight, weight.t(), bias)
    panels = packed.panels[first // PANEL :]
    scales, biases = (None if row is None else row[first:] for row in (packed.scales, packed.biases))
    return _described(PackedWeight(weight, weight.t(), bias, panels, scales, biases), int(packed.descriptor[-1]))


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


def linear(x: torch.Tensor, weight: PackedWeight, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b (+ residual).

    x: [M, K]; residual: [M, N] or None
    Returns [M, N] in x's dtype.
    """
    if weight.address and native.cpu is not None and native.suits(x):
        out = x.new_empty(x.shape[0], weight.num_rows)
        added = 0 if residual is None else residual.data_ptr()
        native.cpu.linear(weight.address, x.data_ptr(), x.shape[0], added, out.data_ptr())
        return out
    product = F.linear(x, weight.weight, weight.bias)
    return product if residual is None else product + residual
