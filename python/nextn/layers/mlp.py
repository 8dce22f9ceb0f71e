"""The dense SwiGLU MLP, which is also the shared expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.kernels.fused_moe import PackedExperts, dense_mlp, pack_experts
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

        self.packed = self._pack()

    def weight_slots(self) -> Iterator[Slot]:
        yield from self.gate_up_proj.weight_slots()
        yield from self.down_proj.weight_slots()

    def prepare(self) -> None:
        """Once loaded, and its linears prepared: put the two together."""
        self.packed = self._pack()

    def _pack(self) -> PackedExperts:
        return pack_experts((), (), (self.gate_up_proj.packed, self.down_proj.packed))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x, residual: [T, H]. Returns [T, H], residual + mlp(x)."""
        return dense_mlp(x, self.packed, residual)
