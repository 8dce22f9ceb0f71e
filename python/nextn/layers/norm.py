"""RMSNorm with a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.kernels.linear import InputFormat, Rows
from nextn.kernels.rms_norm import norm_quantize, rms_norm
from nextn.layers.storage import Slot


class RMSNorm(nn.Module):
    """weight: [size]; the published weights multiply as they are (they are not stored shifted by one)."""

    def __init__(self, size: int, eps: float, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype)

    def weight_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.name}.weight", self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size]. Returns the same shape."""
        return rms_norm(x, self.weight, self.eps)

    def forward_for(self, x: torch.Tensor, wanted: InputFormat | None) -> torch.Tensor | Rows:
        """As ``forward``, and in the same pass what a linear wants for its input. x: [T, size]."""
        if wanted is None:
            return rms_norm(x, self.weight, self.eps)
        rows = norm_quantize(x, self.weight, self.eps, group_size=wanted.group_size)
        assert rows.q is not None, "it was asked for"
        assert rows.scale is not None, "it was asked for"
        return Rows(rows.q, rows.scale, rows.normed, x.dtype)
