"""Routers, and mixtures of experts, whole and as one of eight ranks has them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.fused_moe import StackedExperts, expert_terms
from nextn.kernels.linear import PackedWeight
from nextn.kernels.moe_combine import moe_combine
from nextn.kernels.router import MAX_TOKEN_TILES, route

from tests.kernels.published.common import Call, of, scales


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    hidden, top_k = config.hidden_size, config.num_experts_per_tok
    x, ids, weights = of(tokens, hidden), of(tokens, top_k, dtype=torch.int64), scales(tokens, top_k)
    gate, counters = scales(config.n_routed_experts, hidden), of(MAX_TOKEN_TILES, dtype=torch.int32)
    for invariant in (False, True):
        yield (
            f"router, batch_invariant {invariant}",
            lambda invariant=invariant: route(
                x,
                PackedWeight(gate, gate.t(), None),
                scales(config.n_routed_experts),
                top_k=top_k,
                n_group=config.n_group,
                topk_group=config.topk_group,
                norm_topk_prob=config.norm_topk_prob,
                routed_scaling_factor=config.routed_scaling_factor,
                counters=counters,
                batch_invariant=invariant,
            ),
        )
    for ranks in (1, 8):
        for case, experts in _stacks(config, config.moe_intermediate_size // ranks, has_fp8_units):
            for invariant in (False, True):
                yield (
                    f"experts {case}, {ranks} ranks, batch_invariant {invariant}",
                    lambda experts=experts, invariant=invariant: moe_combine(
                        expert_terms(x, ids, weights, experts, x, batch_invariant=invariant)
                    ),
                )


def _stacks(config: ModelConfig, inner: int, has_fp8_units: bool) -> Iterator[tuple[str, StackedExperts]]:
    hidden, routed = config.hidden_size, config.n_routed_experts
    e = routed + 1
    w13, w2 = (e, 2 * inner, hidden), (e, hidden, inner)
    yield (
        "per channel",
        StackedExperts(
            of(*w13, dtype=FP8),
            scales(e, 2 * inner, 1),
            of(*w2, dtype=FP8),
            scales(e, hidden, 1),
            None,
            routed,
            True,
            has_fp8_units,
        ),
    )
    block = (128, 128) if inner % 128 == 0 else (64, 64) if inner % 64 == 0 else (16, 128)
    block_n, block_k = block
    w13_blocks = scales(e, 2 * -(-inner // block_n), -(-hidden // block_k))
    w2_blocks = scales(e, -(-hidden // block_n), -(-inner // block_k))
    yield (
        "per block",
        StackedExperts(
            of(*w13, dtype=FP8), w13_blocks, of(*w2, dtype=FP8), w2_blocks, block, routed, True, has_fp8_units
        ),
    )
    yield "unquantized", StackedExperts(of(*w13), None, of(*w2), None, None, routed, True)
