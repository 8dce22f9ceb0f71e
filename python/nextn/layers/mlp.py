"""The dense SwiGLU MLP, which is also the shared expert. Each rank holds a share of its intermediate size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from nextn.config.cuts import cut_unit, share_of
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.fused_moe import PackedExperts, dense_mlp, pack_experts
from nextn.kernels.linear import InputFormat, PackedWeight, Rows
from nextn.kernels.silu_mul import silu_mul, silu_mul_quantize
from nextn.layers.linear import Linear
from nextn.layers.norm import Stream, sum_over_ranks
from nextn.layers.storage import Shard, Slot
from nextn.quantization.scheme import LinearScheme, QuantizationConfig, scheme_of


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, 2020).

    input_format: how its input should come; None for wide
    storage: where the weights of gate and up, and of down, are to be; made where not given
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
        storage: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        gate, up, down = (f"{prefix}.{part}_proj" for part in ("gate", "up", "down"))
        unit = intermediate_unit(scheme_of(quant_config, [gate, up]), scheme_of(quant_config, [down]))
        inner = share_of(f"{prefix}: intermediate size", intermediate_size, unit, tp.size, tp.rank)
        shards = [Shard.of_rows(gate, inner), Shard.of_rows(up, inner)]
        for_gate_up, for_down = storage or (None, None)
        self.gate_up_proj = Linear(hidden_size, shards, quant_config, dtype=dtype, weight=for_gate_up)
        shards = [Shard.of_columns(down, hidden_size, inner)]
        self.down_proj = Linear(len(inner), shards, quant_config, dtype=dtype, weight=for_down)
        self.packed: PackedExperts | None = self._pack()
        self.input_format: InputFormat | None = None

    def weight_slots(self) -> Iterator[Slot]:
        yield from self.gate_up_proj.weight_slots()
        yield from self.down_proj.weight_slots()

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded, and its linears prepared: put the two together."""
        self.packed = self._pack()
        self.input_format = self.gate_up_proj.input_format

    def _pack(self) -> PackedExperts | None:
        gate_up, down = self.gate_up_proj.packed, self.down_proj.packed
        if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
            return pack_experts((), (), (gate_up, down))
        return None

    def forward(self, x: torch.Tensor | Rows, residual: torch.Tensor | None = None) -> Stream:
        """x, residual: [T, H]. Returns [T, H], residual + mlp(x), over several ranks yet to be added."""
        return sum_over_ranks(self.tp, partial(self.term, x), residual)

    def term(self, x: torch.Tensor | Rows, residual: torch.Tensor | None) -> torch.Tensor:
        """This rank's term of mlp(x), plus residual. x, residual: [T, H]. Returns [T, H]."""
        if self.packed is not None and isinstance(x, torch.Tensor):
            return dense_mlp(x, self.packed, residual)
        gate_up, wanted = self.gate_up_proj.forward(x), self.down_proj.input_format
        if wanted is None:
            return self.down_proj.forward(silu_mul(gate_up), residual)
        activated = Rows(*silu_mul_quantize(gate_up, wanted.group_size), None, gate_up.dtype)
        return self.down_proj.forward(activated, residual)


def intermediate_unit(up: LinearScheme, down: LinearScheme) -> int:
    """What shares of an intermediate size are multiples of: it is the rows of one matrix, the columns of the other."""
    return cut_unit((up.block[0] if up.block else None, down.block[1] if down.block else None))
