"""Mixture of experts: a float32 router, stacked routed experts, and shared experts that every token takes.

Each rank holds a share of every expert, and the whole router.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from nextn.config.cuts import share_of
from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.fused_moe import PackedExperts, fused_moe, pack_experts
from nextn.kernels.linear import PackedWeight, pack_weight
from nextn.kernels.router import route
from nextn.layers.mlp import MLP, intermediate_unit
from nextn.layers.storage import ScaleStorage, Shard, Slot, make_scales, make_weight, pack, weight_slots
from nextn.quantization.scheme import LinearScheme, QuantizationConfig, scheme_of


class MoE(nn.Module):
    """y = Σ wₑ · expertₑ(x) + shared(x) (DeepSeek-V3, section 2.1.2, as GLM-4.5 uses it)."""

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.config = config
        self.prefix = prefix
        num_experts = config.n_routed_experts
        self.gate = torch.empty(num_experts, config.hidden_size)
        self.e_score_correction_bias = torch.empty(num_experts)
        self.experts = Experts(config, quant_config, f"{prefix}.experts", dtype, tp)
        shared_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = (
            MLP(config.hidden_size, shared_size, quant_config, f"{prefix}.shared_experts", dtype, tp)
            if shared_size
            else None
        )
        self.packed_gate = PackedWeight(self.gate, self.gate.t(), None)
        self.packed = self._pack()

    def weight_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.prefix}.gate.weight", self.gate)
        yield Slot(f"{self.prefix}.gate.e_score_correction_bias", self.e_score_correction_bias)
        yield from self.experts.weight_slots()
        if self.shared_experts is not None:
            yield from self.shared_experts.weight_slots()

    def prepare(self) -> None:
        """Once loaded, and the experts prepared: put routed and shared experts together."""
        self.packed_gate = pack_weight(self.gate)
        self.packed = self._pack()

    def _pack(self) -> PackedExperts:
        shared = self.shared_experts
        return pack_experts(
            self.experts.packed_w13,
            self.experts.packed_w2,
            None if shared is None else (shared.gate_up_proj.packed, shared.down_proj.packed),
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x, residual: [T, H]. Returns [T, H], residual + moe(x)."""
        config = self.config
        weights, ids = route(
            x,
            self.packed_gate,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        return self.tp.all_reduce(fused_moe(x, ids, weights, self.packed, residual if self.tp.is_first else None))


ExpertShards = list[tuple[Shard, ...]]
"""Per expert, the checkpoint modules of one of its matrices."""


class Experts(nn.Module):
    """The routed experts' weights, stacked. A fused module is quantized as one, so all experts share a scheme.

    w13: [E, 2I, H], gate rows first; w2: [E, H, I], where I is the rank's share of the intermediate size
    packed_w13, packed_w2: per expert the same, ready to multiply
    """

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        hidden = config.hidden_size
        names = [f"{prefix}.{e}" for e in range(config.n_routed_experts)]
        self.w13_scheme = scheme_of(quant_config, [f"{name}.{part}_proj" for name in names for part in ("gate", "up")])
        self.w2_scheme = scheme_of(quant_config, [f"{name}.down_proj" for name in names])
        unit = intermediate_unit(self.w13_scheme, self.w2_scheme)
        share = share_of(f"{prefix}: intermediate size", config.moe_intermediate_size, unit, tp.size, tp.rank)
        inner = len(share)
        self.w13_shards: ExpertShards = [
            (Shard.of_rows(f"{name}.gate_proj", share), Shard.of_rows(f"{name}.up_proj", share)) for name in names
        ]
        self.w2_shards: ExpertShards = [(Shard.of_columns(f"{name}.down_proj", hidden, share),) for name in names]
        self.w13 = _stack(self.w13_shards, hidden, self.w13_scheme, dtype)
        self.w2 = _stack(self.w2_shards, inner, self.w2_scheme, dtype)
        self.w13_scales = [make_scales(shards, hidden, self.w13_scheme) for shards in self.w13_shards]
        self.w2_scales = [make_scales(shards, inner, self.w2_scheme) for shards in self.w2_shards]
        self.packed_w13 = tuple(PackedWeight(w, w.t(), None) for w in self.w13)
        self.packed_w2 = tuple(PackedWeight(w, w.t(), None) for w in self.w2)

    def weight_slots(self) -> Iterator[Slot]:
        for e, shards in enumerate(self.w13_shards):
            yield from weight_slots(shards, self.w13_scheme, self.w13[e], self.w13_scales[e])
        for e, down in enumerate(self.w2_shards):
            yield from weight_slots(down, self.w2_scheme, self.w2[e], self.w2_scales[e])

    def prepare(self) -> None:
        """Once loaded: replace FP8 codes and scales by their product in the computing type."""
        self.w13, self.packed_w13 = _pack_stack(self.w13_shards, self.w13_scheme, self.w13, self.w13_scales, self.dtype)
        self.w13_scales = [None] * len(self.w13_shards)
        self.w2, self.packed_w2 = _pack_stack(self.w2_shards, self.w2_scheme, self.w2, self.w2_scales, self.dtype)
        self.w2_scales = [None] * len(self.w2_shards)


def _stack(shards: ExpertShards, in_features: int, scheme: LinearScheme, dtype: torch.dtype) -> torch.Tensor:
    one = make_weight(shards[0], in_features, scheme, dtype)
    return torch.empty(len(shards), *one.shape, dtype=one.dtype)


def _pack_stack(
    shards: ExpertShards,
    scheme: LinearScheme,
    stacked: torch.Tensor,
    scales: list[ScaleStorage | None],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, tuple[PackedWeight, ...]]:
    """The expanded stack, and its experts ready to multiply, which are views of it."""
    out = torch.empty(stacked.shape, dtype=dtype)
    packed = []
    for e, of_one in enumerate(shards):
        one = pack(of_one, scheme, stacked[e], scales[e], dtype)
        out[e] = one.weight
        packed.append(replace(one, weight=out[e], transposed=out[e].t()))
    return out, tuple(packed)
