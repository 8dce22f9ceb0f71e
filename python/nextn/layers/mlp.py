"""The dense SwiGLU MLP, which is also the shared expert. Each rank holds a share of its intermediate size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.cuts import cut_unit, share_of
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.fused_moe import PackedExperts, dense_mlp, pack_experts
from nextn.layers.linear import Linear
from nextn.layers.storage import Shard, Slot
from nextn.quantization.scheme import LinearScheme, QuantizationConfig, scheme_of


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.tp = tp
        gate, up, down = (f"{prefix}.{part}_proj" for part in ("gate", "up", "down"))
        unit = intermediate_unit(scheme_of(quant_config, [gate, up]), scheme_of(quant_config, [down]))
        inner = share_of(f"{prefix}: intermediate size", intermediate_size, unit, tp.size, tp.rank)
        self.gate_up_proj = Linear(
            hidden_size, [Shard.of_rows(gate, inner), Shard.of_rows(up, inner)], quant_config, dtype=dtype
        )
        self.down_proj = Linear(len(inner), [Shard.of_columns(down, hidden_size, inner)], quant_config, dtype=dtype)
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
        return self.tp.all_reduce(dense_mlp(x, self.packed, residual if self.tp.is_first else None))


def intermediate_unit(up: LinearScheme, down: LinearScheme) -> int:
    """What shares of an intermediate size are multiples of: it is the rows of one matrix, the columns of the other."""
    return cut_unit((up.block[0] if up.block else None, down.block[1] if down.block else None))
