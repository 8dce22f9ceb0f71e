"""RMSNorm with a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.kernels.linear import InputFormat, Rows
from nextn.kernels.moe_combine import ExpertTerms
from nextn.kernels.rms_norm import norm_quantize, rms_norm
from nextn.layers.storage import Slot

Stream = torch.Tensor | ExpertTerms
"""The residual stream, or what it is the sum of."""


class RMSNorm(nn.Module):
    """weight: [size]; the published weights multiply as they are (they are not stored shifted by one)."""

    def __init__(self, size: int, eps: float, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype)

    def weight_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.name}.weight", self.weight)

    def forward(self, x: Stream) -> torch.Tensor:
        """x: [..., size]. Returns the same shape."""
        if isinstance(x, ExpertTerms):
            return norm_quantize(x, self.weight, self.eps, quantize=False).normed
        return rms_norm(x, self.weight, self.eps)

    def forward_for(self, x: Stream, wanted: InputFormat | None) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """In one pass over the residual stream: its sum, and its norm as a linear wants its input.

        x: [T, size]. Returns x [T, size], summed, and ``forward`` of it.
        """
        if wanted is None and not isinstance(x, ExpertTerms):
            return x, rms_norm(x, self.weight, self.eps)
        size = None if wanted is None else wanted.group_size
        rows = norm_quantize(x, self.weight, self.eps, quantize=wanted is not None, group_size=size)
        if wanted is None:
            return rows.sum, rows.normed
        assert rows.q is not None, "it was asked for"
        assert rows.scale is not None, "it was asked for"
        return rows.sum, Rows(rows.q, rows.scale, rows.normed, rows.sum.dtype)
