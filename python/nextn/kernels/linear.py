"""x Wᵀ + b on a CPU, with a copy of the weight laid out for oneDNN where that pays.

Floor: the weight's N · K elements, read once, until M reaches a few dozen rows; then 2 · M · N · K FLOPs.
A plain product is the faster one for a row or two, oneDNN's blocked layout from three rows on (about 2× at M = 64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

MIN_PACKED_ROWS = 3
MAX_PACKED_BYTES = 16 * 2**20
"""Larger weights are not worth a second copy: their product is limited by memory in either layout."""


@dataclass(frozen=True)
class PackedWeight:
    """weight: [N, K]; packed: the same in oneDNN's layout, or None."""

    weight: torch.Tensor
    packed: torch.Tensor | None


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Prepare a float32 weight [N, K] for ``linear``. Without oneDNN, or for large weights, nothing is copied."""
    suits = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() * weight.itemsize <= MAX_PACKED_BYTES
        and torch.backends.mkldnn.is_available()
    )
    return PackedWeight(weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone()) if suits else None)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b.

    x: [M, K]; bias: [N] or None
    Returns [M, N] in x's dtype.
    """
    if weight.packed is None or x.shape[0] < MIN_PACKED_ROWS:
        return F.linear(x, weight.weight, bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.packed, bias, "none", [], "")
    return out
