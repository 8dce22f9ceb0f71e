"""Mixture of experts: a float32 router, stacked routed experts, and shared experts that every token takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.model_config import ModelConfig
from nextn.kernels.fused_moe import fused_moe
from nextn.kernels.router import route
from nextn.layers.mlp import MLP
from nextn.layers.storage import ScaleStorage, Shard, Slot, expand, make_scales, make_weight, weight_slots
from nextn.quantization.scheme import UNQUANTIZED, LinearScheme, QuantizationConfig


class MoE(nn.Module):
    """y = Σ wₑ · expertₑ(x) + shared(x) (DeepSeek-V3, section 2.1.2, as GLM-4.5 uses it)."""

    def __init__(
        self, config: ModelConfig, quant_config: QuantizationConfig | None, prefix: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.prefix = prefix
        num_experts = config.n_routed_experts
        self.gate = torch.empty(num_experts, config.hidden_size)
        self.e_score_correction_bias = torch.empty(num_experts)
        self.experts = Experts(config, quant_config, f"{prefix}.experts", dtype)
        shared_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = (
            MLP(config.hidden_size, shared_size, quant_config, f"{prefix}.shared_experts", dtype)
            if shared_size
            else None
        )

    def weight_slots(self) -> Iterator[Slot]:
        yield f"{self.prefix}.gate.weight", self.gate
        yield f"{self.prefix}.gate.e_score_correction_bias", self.e_score_correction_bias
        yield from self.experts.weight_slots()
        if self.shared_experts is not None:
            yield from self.shared_experts.weight_slots()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, H]. Returns [T, H]."""
        config = self.config
        weights, ids = route(
            x,
            self.gate,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        routed = fused_moe(x, ids, weights, *self.experts.views)
        return routed if self.shared_experts is None else routed.add_(self.shared_experts.forward(x))


ExpertShards = list[tuple[Shard, ...]]
"""Per expert, the checkpoint modules of one of its matrices."""


class Experts(nn.Module):
    """The routed experts' weights, stacked. A fused module is quantized as one, so all experts share a scheme.

    w13: [E, 2I, H], gate rows first; w2: [E, H, I]
    views: per expert [H, 2I] and [I, H], views of the two
    """

    def __init__(
        self, config: ModelConfig, quant_config: QuantizationConfig | None, prefix: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        num_experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        names = [f"{prefix}.{e}" for e in range(num_experts)]
        self.w13_shards: ExpertShards = [
            (Shard(f"{name}.gate_proj", inner), Shard(f"{name}.up_proj", inner)) for name in names
        ]
        self.w2_shards: ExpertShards = [(Shard(f"{name}.down_proj", hidden),) for name in names]
        self.w13_scheme = _scheme(quant_config, self.w13_shards)
        self.w2_scheme = _scheme(quant_config, self.w2_shards)
        self.w13 = _stack(self.w13_shards, hidden, self.w13_scheme, dtype)
        self.w2 = _stack(self.w2_shards, inner, self.w2_scheme, dtype)
        self.w13_scales = [make_scales(shards, hidden, self.w13_scheme) for shards in self.w13_shards]
        self.w2_scales = [make_scales(shards, inner, self.w2_scheme) for shards in self.w2_shards]
        self.views = _transposed_views(self.w13, self.w2)

    def weight_slots(self) -> Iterator[Slot]:
        for e, shards in enumerate(self.w13_shards):
            yield from weight_slots(shards, self.w13_scheme, self.w13[e], self.w13_scales[e])
        for e, down in enumerate(self.w2_shards):
            yield from weight_slots(down, self.w2_scheme, self.w2[e], self.w2_scales[e])

    def prepare(self) -> None:
        """Once loaded: replace FP8 codes and scales by their product in the computing type."""
        self.w13 = _expand_stack(self.w13_shards, self.w13_scheme, self.w13, self.w13_scales, self.dtype)
        self.w13_scales = [None] * len(self.w13_shards)
        self.w2 = _expand_stack(self.w2_shards, self.w2_scheme, self.w2, self.w2_scales, self.dtype)
        self.w2_scales = [None] * len(self.w2_shards)
        self.views = _transposed_views(self.w13, self.w2)


def _transposed_views(w13: torch.Tensor, w2: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Each expert's matrices as a product takes them; made once, since making a view costs as much as using it."""
    return w13.transpose(1, 2).unbind(0), w2.transpose(1, 2).unbind(0)


def _scheme(quant_config: QuantizationConfig | None, shards: ExpertShards) -> LinearScheme:
    return quant_config.scheme_for([s.name for of_one in shards for s in of_one]) if quant_config else UNQUANTIZED


def _stack(shards: ExpertShards, in_features: int, scheme: LinearScheme, dtype: torch.dtype) -> torch.Tensor:
    one = make_weight(shards[0], in_features, scheme, dtype)
    return torch.empty(len(shards), *one.shape, dtype=one.dtype)


def _expand_stack(
    shards: ExpertShards,
    scheme: LinearScheme,
    stacked: torch.Tensor,
    scales: list[ScaleStorage | None],
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty(stacked.shape, dtype=dtype)
    for e, of_one in enumerate(shards):
        out[e] = expand(of_one, scheme, stacked[e], scales[e], dtype)
    return out
