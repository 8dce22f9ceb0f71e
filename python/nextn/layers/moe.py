"""Mixture of experts: a float32 router, stacked routed experts, and shared experts that every token takes.

Each rank holds a share of every expert, and the whole router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from nextn.config.cuts import share_of
from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.errors import QuantizationError
from nextn.kernels import gpu
from nextn.kernels.fused_moe import PackedExperts, StackedExperts, expert_terms, fused_moe, pack_experts
from nextn.kernels.linear import InputFormat, PackedWeight, Rows, pack_weight
from nextn.kernels.moe_combine import ExpertTerms, moe_combine
from nextn.kernels.router import MAX_TOKEN_TILES, route
from nextn.layers.mlp import MLP, intermediate_unit
from nextn.layers.norm import Stream, sum_over_ranks
from nextn.layers.storage import ScaleStorage, Shard, Slot, make_scales, make_weight, pack, shard_scale, weight_slots
from nextn.quantization.experts import why_not_on_gpu
from nextn.quantization.scheme import LinearScheme, QuantizationConfig, scheme_of


class MoE(nn.Module):
    """y = Σ wₑ · expertₑ(x) + shared(x) (DeepSeek-V3, section 2.1.2, as GLM-4.5 uses it).

    input_format: how its input should come beside wide, for the router; None for nothing else
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
        self.tp = tp
        self.config = config
        self.prefix = prefix
        num_experts = config.n_routed_experts
        self.gate = torch.empty(num_experts, config.hidden_size)
        self.e_score_correction_bias = torch.empty(num_experts)
        # On a GPU the shared expert is one more of the routed ones, where it is of the same size and kind.
        is_one_more = gpu.suits(self.gate) and _shared_is_alike(config, quant_config, prefix)
        self.experts = Experts(config, quant_config, f"{prefix}.experts", dtype, tp, has_one_more=is_one_more)
        shared_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts: MLP | None = None
        if shared_size:
            name, storage = f"{prefix}.shared_experts", self.experts.one_more
            self.shared_experts = MLP(config.hidden_size, shared_size, quant_config, name, dtype, tp, storage)
        self.packed_gate = PackedWeight(self.gate, self.gate.t(), None)
        self.packed: PackedExperts | StackedExperts = self._pack()
        self.batch_invariant = False
        self.input_format: InputFormat | None = None
        self.counters: torch.Tensor | None = None

    def weight_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.prefix}.gate.weight", self.gate)
        yield Slot(f"{self.prefix}.gate.e_score_correction_bias", self.e_score_correction_bias)
        yield from self.experts.weight_slots()
        if self.shared_experts is not None:
            yield from self.shared_experts.weight_slots()

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded, and the experts prepared: put routed and shared experts together."""
        self.batch_invariant = batch_invariant
        if gpu.suits(self.gate):
            self.packed = stacked = self._stack()
            if self.experts.w13_scheme.quantizes_input and gpu.has_fp8_units(self.gate.device):
                self.input_format = InputFormat(None if stacked.block is None else stacked.block[1])
            self.counters = torch.zeros(MAX_TOKEN_TILES, dtype=torch.int32, device=self.gate.device)
        else:
            self.packed_gate = pack_weight(self.gate)
            self.packed = self._pack()

    def _pack(self) -> PackedExperts:
        if self.shared_experts is None:
            return pack_experts(self.experts.packed_w13, self.experts.packed_w2, None)
        gate_up, down = self.shared_experts.gate_up_proj.packed, self.shared_experts.down_proj.packed
        assert isinstance(gate_up, PackedWeight), "the experts are packed too"
        assert isinstance(down, PackedWeight), "the experts are packed too"
        return pack_experts(self.experts.packed_w13, self.experts.packed_w2, (gate_up, down))

    def _stack(self) -> StackedExperts:
        shared = self.shared_experts
        if shared is None or self.experts.one_more is None:
            return self.experts.stacked(())
        linears = (shared.gate_up_proj, shared.down_proj)
        return self.experts.stacked([shard_scale(one.shards, one.scheme, one.scales)[0] for one in linears])

    def forward(self, x: torch.Tensor | Rows, residual: torch.Tensor | None = None) -> Stream:
        """x, residual: [T, H]. Returns [T, H], residual + moe(x), or what it is the sum of, for the next norm."""
        config = self.config
        wide = x.wide if isinstance(x, Rows) else x
        assert wide is not None, "the router reads its input wide"
        weights, ids = route(
            wide,
            self.packed_gate,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            counters=self.counters,
            batch_invariant=self.batch_invariant,
        )
        if isinstance(self.packed, PackedExperts):
            return sum_over_ranks(self.tp, partial(fused_moe, wide, ids, weights, self.packed), residual)
        terms = partial(self._terms, self.packed, x, wide, ids, weights)
        if self.tp.size == 1:
            return terms(residual)
        return sum_over_ranks(self.tp, lambda residual: moe_combine(terms(residual)), residual)

    def _terms(
        self,
        packed: StackedExperts,
        x: torch.Tensor | Rows,
        wide: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> ExpertTerms:
        """On a GPU, what this rank's share of routed and shared experts makes, and residual."""
        if self.shared_experts is not None and not packed.has_shared:
            residual = self.shared_experts.term(x, residual)
        quantized = (x.q, x.scale) if isinstance(x, Rows) else None
        return expert_terms(
            wide, ids, weights, packed, residual, quantized=quantized, batch_invariant=self.batch_invariant
        )


def _shared_is_alike(config: ModelConfig, quant_config: QuantizationConfig | None, prefix: str) -> bool:
    """Whether the shared expert could be one of the routed ones."""

    def kinds(name: str) -> list[tuple[str, tuple[int, int] | None, bool]]:
        groups = (("gate_proj", "up_proj"), ("down_proj",))
        schemes = [scheme_of(quant_config, [f"{name}.{part}" for part in group]) for group in groups]
        return [(scheme.kind, scheme.block, scheme.quantizes_input) for scheme in schemes]

    return config.n_shared_experts == 1 and kinds(f"{prefix}.shared_experts") == kinds(f"{prefix}.experts.0")


ExpertShards = list[tuple[Shard, ...]]
"""Per expert, the checkpoint modules of one of its matrices."""


class Experts(nn.Module):
    """The routed experts' weights, stacked. A fused module is quantized as one, so all experts share a scheme.

    w13: [E, 2I, H], gate rows first; w2: [E, H, I], where I is the rank's share of the intermediate size
    packed_w13, packed_w2: per expert the same, ready to multiply
    one_more: w13 and w2 of one expert more, in the same stacks, where there is one; not filled here
    """

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
        *,
        has_one_more: bool = False,
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
        num_experts = len(names)
        self.all_w13 = _stack(num_experts + has_one_more, self.w13_shards[0], hidden, self.w13_scheme, dtype)
        self.all_w2 = _stack(num_experts + has_one_more, self.w2_shards[0], inner, self.w2_scheme, dtype)
        self.w13, self.w2 = self.all_w13[:num_experts], self.all_w2[:num_experts]
        reason = why_not_on_gpu(names[0], self.w13_scheme, self.w2_scheme)
        if reason is not None and gpu.suits(self.all_w13):
            raise QuantizationError(reason)
        self.one_more = (self.all_w13[num_experts], self.all_w2[num_experts]) if has_one_more else None
        self.w13_scales = [make_scales(shards, hidden, self.w13_scheme) for shards in self.w13_shards]
        self.w2_scales = [make_scales(shards, inner, self.w2_scheme) for shards in self.w2_shards]
        self.packed_w13 = tuple(PackedWeight(w, w.t(), None) for w in self.w13)
        self.packed_w2 = tuple(PackedWeight(w, w.t(), None) for w in self.w2)

    def weight_slots(self) -> Iterator[Slot]:
        for e, shards in enumerate(self.w13_shards):
            yield from weight_slots(shards, self.w13_scheme, self.w13[e], self.w13_scales[e])
        for e, down in enumerate(self.w2_shards):
            yield from weight_slots(down, self.w2_scheme, self.w2[e], self.w2_scales[e])

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded: on a CPU replace FP8 codes and scales by their product in the computing type."""
        if gpu.suits(self.w13):
            return
        self.w13, self.packed_w13 = _pack_stack(self.w13_shards, self.w13_scheme, self.w13, self.w13_scales, self.dtype)
        self.w13_scales = [None] * len(self.w13_shards)
        self.w2, self.packed_w2 = _pack_stack(self.w2_shards, self.w2_scheme, self.w2, self.w2_scales, self.dtype)
        self.w2_scales = [None] * len(self.w2_shards)
        self.all_w13, self.all_w2 = self.w13, self.w2

    def stacked(self, scales_of_one_more: Sequence[torch.Tensor | None]) -> StackedExperts:
        """As they are stored, on a GPU. scales_of_one_more: of its w13 and w2, where there is one."""
        w13_more, w2_more = scales_of_one_more or (None, None)
        w13_scale, w13_block = _stacked_scales(self.w13_shards, self.w13_scheme, self.w13_scales, w13_more)
        w2_scale, _ = _stacked_scales(self.w2_shards, self.w2_scheme, self.w2_scales, w2_more)
        return StackedExperts(
            self.all_w13,
            w13_scale,
            self.all_w2,
            w2_scale,
            w13_block,
            num_routed=len(self.w13_shards),
            has_shared=self.one_more is not None,
            quantizes_input=self.w13_scheme.quantizes_input,
        )


def _stacked_scales(
    shards: ExpertShards, scheme: LinearScheme, scales: list[ScaleStorage | None], more: torch.Tensor | None
) -> tuple[torch.Tensor | None, tuple[int, int] | None]:
    """Every expert's scales, stacked, ``more`` last, and the block that each belongs to."""
    each = [shard_scale(of_one, scheme, scale) for of_one, scale in zip(shards, scales, strict=True)]
    known = [scale for scale in (*(scale for scale, _ in each), more) if scale is not None]
    return torch.stack(known) if known else None, each[0][1]


def _stack(
    num_experts: int, shards: Sequence[Shard], in_features: int, scheme: LinearScheme, dtype: torch.dtype
) -> torch.Tensor:
    one = make_weight(shards, in_features, scheme, dtype)
    return torch.empty(num_experts, *one.shape, dtype=one.dtype)


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
        assert isinstance(one, PackedWeight), "on a GPU experts stay stacked"
        out[e] = one.weight
        packed.append(replace(one, weight=out[e], transposed=out[e].t()))
    return out, tuple(packed)
