"""RMSNorm with a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.kernels.rms_norm import rms_norm
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
