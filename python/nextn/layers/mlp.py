"""The dense SwiGLU MLP, which is also the shared expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.kernels.silu_mul import silu_mul
from nextn.layers.linear import Linear
from nextn.layers.storage import Shard, Slot
from nextn.quantization.scheme import QuantizationConfig


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            hidden_size,
            [Shard(f"{prefix}.gate_proj", intermediate_size), Shard(f"{prefix}.up_proj", intermediate_size)],
            quant_config,
            dtype=dtype,
        )
        self.down_proj = Linear(
            intermediate_size, [Shard(f"{prefix}.down_proj", hidden_size)], quant_config, dtype=dtype
        )

    def weight_slots(self) -> Iterator[Slot]:
        yield from self.gate_up_proj.weight_slots()
        yield from self.down_proj.weight_slots()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, H]. Returns [T, H]."""
        return self.down_proj.forward(silu_mul(self.gate_up_proj.forward(x)))
