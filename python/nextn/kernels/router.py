"""Expert selection of GLM-4.x: sigmoid scores, a bias that steers the choice but not the weights, groups.

Floor: the gate's weight [E, H] in float32, read once; at small batches limited by latency.

One Triton kernel does it all: many programs share the product, by experts and along H, and of those of a tile of tokens
the last to finish adds the partial sums in a fixed order and chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import gpu, native
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.linear import PackedWeight, linear

MAX_TOKEN_TILES = 1 << 14
"""Size of a counter buffer: most tiles of tokens."""

CHOICE_SIZE = 2048
"""Scores that are chosen from at once, which registers must hold."""


@dataclass(frozen=True)
class RouterConfig:
    """How the product is cut up.

    block_m, block_e: a program's tile of tokens and experts; block_k: a step along H
    split_k: programs that share a tile's H
    """

    block_m: int
    block_e: int
    block_k: int
    split_k: int
    num_stages: int


def route(
    x: torch.Tensor,
    gate: PackedWeight,
    correction_bias: torch.Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights, all in float32 (DeepSeek-V3, section 2.1.2; auxiliary-loss-free balancing).

    The choice maximises sigmoid(x · gate) + bias, within the topk_group groups whose two best experts score highest in
    sum. The weights are the chosen experts' unbiased scores, divided by their sum if norm_topk_prob, times the factor.

    x: [T, H]; gate: [E, H] float32; correction_bias: [E] float32
    counters: [MAX_TOKEN_TILES] int32 of zeros on a GPU, which are zeros again afterwards; made where not given
    batch_invariant: add in an order that does not depend on T
    Returns weights [T, top_k] float32 and expert ids [T, top_k] int64.
    """
    if gate.address and native.cpu is not None and native.suits(x):
        weights = x.new_empty(x.shape[0], top_k)
        ids = torch.empty(x.shape[0], top_k, dtype=torch.int64)
        native.cpu.route(
            gate.address,
            correction_bias.data_ptr(),
            x.data_ptr(),
            x.shape[0],
            top_k,
            n_group,
            topk_group,
            norm_topk_prob,
            routed_scaling_factor,
            weights.data_ptr(),
            ids.data_ptr(),
        )
        return weights, ids
    if gpu.suits(x, gate.weight):
        return _launch_route(
            x,
            gate.weight,
            correction_bias,
            counters,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
            batch_invariant=batch_invariant,
        )
    scores = linear(x.float(), gate).sigmoid_()
    biased = scores + correction_bias
    if n_group > 1:
        grouped = biased.view(x.shape[0], n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(topk_group, dim=-1, sorted=False).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        biased = grouped.masked_fill(outside[:, :, None], float("-inf")).view(x.shape[0], -1)
    ids = biased.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids


def choose_config(
    num_tokens: int, num_experts: int, hidden: int, processors: int, *, batch_invariant: bool
) -> RouterConfig:
    """So that registers do not spill: float32 in three parts takes many. Of 16 experts every warp would do all.

    processors: streaming multiprocessors of the card. Each split is compiled for, so they are powers of two.
    """

    def split_for(programs: int, tiles: int, max_split: int) -> int:
        return min(gpu.next_power_of_2(max(programs // tiles, 1)), max_split, max(hidden // 256, 1))

    if batch_invariant:
        return RouterConfig(16, 32, 64, min(max(hidden // 512, 1), 8), num_stages=9)
    if num_tokens <= 256:
        tiles = gpu.cdiv(num_tokens, 16) * gpu.cdiv(num_experts, 32)
        return RouterConfig(16, 32, 64, split_for(processors, tiles, 16), num_stages=9)
    tiles = gpu.cdiv(num_tokens, 64) * gpu.cdiv(num_experts, 32)
    return RouterConfig(64, 32, 64, split_for(2 * processors, tiles, 8), num_stages=3)


def _launch_route(
    x: torch.Tensor,
    gate: torch.Tensor,
    correction_bias: torch.Tensor,
    counters: torch.Tensor | None,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_tokens, hidden), num_experts = x.shape, gate.shape[0]
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=x.device)
    if not num_tokens:
        return weights, ids
    processors = gpu.num_processors(x.device)
    config = choose_config(num_tokens, num_experts, hidden, processors, batch_invariant=batch_invariant)
    num_tiles = gpu.cdiv(num_tokens, config.block_m)
    if counters is None or num_tiles > counters.numel():
        counters = torch.zeros(max(num_tiles, MAX_TOKEN_TILES), dtype=torch.int32, device=x.device)
    logits = torch.empty(config.split_k, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    experts = gpu.next_power_of_2(num_experts)
    gpu.launch(
        _route,
        (num_tiles, gpu.cdiv(num_experts, config.block_e), config.split_k),
        x.contiguous(),
        gate.contiguous(),
        correction_bias,
        logits,
        counters,
        weights,
        ids,
        num_tokens,
        num_experts,
        hidden,
        routed_scaling_factor,
        num_warps=4,
        num_stages=config.num_stages,
        TOP_K=top_k,
        NUM_GROUPS=n_group,
        TOPK_GROUP=topk_group,
        NORMALISE=norm_topk_prob,
        SPLIT_K=config.split_k,
        EVEN_K=hidden % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_E=config.block_e,
        BLOCK_K=config.block_k,
        ROWS=min(gpu.next_power_of_2(num_tokens), max(CHOICE_SIZE // experts, 1), config.block_m),
        EXPERTS=experts,
        CHOICES=gpu.next_power_of_2(top_k),
        GROUPS=gpu.next_power_of_2(n_group),
    )
    return weights, ids


@jit
def _cut_to_bfloat16(values):  # type: ignore[no-untyped-def]
    """float32 without the bits that bfloat16 has no room for."""
    return (values.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@jit
def _exact_product(x, gate):  # type: ignore[no-untyped-def]
    """x gateᵀ of [BLOCK_M, BLOCK_K] and float32 [BLOCK_E, BLOCK_K].

    A float32's 24 bits are those of three bfloat16, so that three products of bfloat16 lose nothing, and are faster.
    Bits are cut off rather than rounded, since hardware is slow to round one number at a time.
    """
    if x.dtype == tl.bfloat16:
        first = _cut_to_bfloat16(gate)
        rest = gate - first
        second = _cut_to_bfloat16(rest)
        third = rest - second
        total = tl.dot(x, tl.trans(third.to(tl.bfloat16)))
        total = tl.dot(x, tl.trans(second.to(tl.bfloat16)), total)
        total = tl.dot(x, tl.trans(first.to(tl.bfloat16)), total)
    else:
        total = tl.dot(x.to(tl.float32), tl.trans(gate), input_precision="ieee")
    return total


@jit
def _without_other_groups(  # type: ignore[no-untyped-def]
    biased, num_experts, NUM_GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    """-inf for experts outside the groups whose two best sum highest. biased: [rows, experts], -inf beyond the last."""
    expert = tl.arange(0, biased.shape[1])[None, :]
    owner = expert // (num_experts // NUM_GROUPS)
    column = tl.arange(0, GROUPS)[None, :]
    scores = tl.full((biased.shape[0], GROUPS), float("-inf"), tl.float32)
    for group in tl.static_range(NUM_GROUPS):
        inside = tl.where(owner == group, biased, float("-inf"))
        best, place = tl.max(inside, 1, return_indices=True)
        second = tl.max(tl.where(expert == place[:, None], float("-inf"), inside), 1)
        scores = tl.where(column == group, (best + second)[:, None], scores)
    is_allowed = expert < 0
    for _ in tl.static_range(TOPK_GROUP):
        _, group = tl.max(scores, 1, return_indices=True)
        is_allowed = is_allowed | (owner == group[:, None])
        scores = tl.where(column == group[:, None], float("-inf"), scores)
    return tl.where(is_allowed, biased, float("-inf"))


@jit
def _choose(  # type: ignore[no-untyped-def]
    scores,
    bias,
    num_experts,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The experts of each row, their scores, [rows, CHOICES], and these scores' sum, [rows].

    The sum is made in the order of choice: how hardware would sum a tile depends on how many rows the tile has.
    scores: [rows, experts]; bias: [experts]
    """
    expert = tl.arange(0, scores.shape[1])[None, :]
    choice = tl.arange(0, CHOICES)[None, :]
    biased = scores + bias[None, :]
    biased = tl.where(biased == biased, biased, -3e38)  # a token that is not a number still gets experts that exist
    biased = tl.where(expert < num_experts, biased, float("-inf"))
    if NUM_GROUPS > 1:
        biased = _without_other_groups(biased, num_experts, NUM_GROUPS, TOPK_GROUP, GROUPS)
    chosen = tl.zeros((scores.shape[0], CHOICES), tl.int32)
    chosen_scores = tl.zeros((scores.shape[0], CHOICES), tl.float32)
    total = tl.zeros((scores.shape[0],), tl.float32)
    for i in tl.static_range(TOP_K):
        _, best = tl.max(biased, 1, return_indices=True)
        is_best = expert == best[:, None]
        score = tl.sum(tl.where(is_best, scores, 0.0), 1)
        biased = tl.where(is_best, float("-inf"), biased)
        chosen = tl.where(choice == i, best[:, None], chosen)
        chosen_scores = tl.where(choice == i, score[:, None], chosen_scores)
        total += score
    return chosen, chosen_scores, total


@jit(varying=("num_tokens",))
def _route(  # type: ignore[no-untyped-def]
    x,
    gate,
    correction_bias,
    logits,
    counters,
    weights,
    ids,
    num_tokens,
    num_experts,
    hidden,
    factor,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    NORMALISE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (tile of tokens, tile of experts, split). Tokens' choices are made ROWS at a time."""
    wait_for_predecessor(EARLY)
    tile, split = tl.program_id(0), tl.program_id(2)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the first ones, and are not stored.
    x_tile = x + tl.where(rows < num_tokens, rows, 0).to(tl.int64)[:, None] * hidden + inner[None, :]
    gate_tile = gate + tl.where(columns < num_experts, columns, 0)[:, None] * hidden + inner[None, :]
    num_steps = tl.cdiv(hidden, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for step in range(num_steps * split // SPLIT_K, num_steps * (split + 1) // SPLIT_K):
        if EVEN_K:
            x_values, gate_values = tl.load(x_tile + step * BLOCK_K), tl.load(gate_tile + step * BLOCK_K)
        else:
            inside = (step * BLOCK_K + inner < hidden)[None, :]
            x_values = tl.load(x_tile + step * BLOCK_K, mask=inside, other=0.0)
            gate_values = tl.load(gate_tile + step * BLOCK_K, mask=inside, other=0.0)
        total += _exact_product(x_values, gate_values)
    size = num_tokens * num_experts
    cells = rows[:, None] * num_experts + columns[None, :]
    tl.store(logits + split * size + cells, total, mask=(rows < num_tokens)[:, None] & (columns < num_experts)[None, :])

    tl.debug_barrier()
    num_done = tl.atomic_add(counters + tile, 1, sem="acq_rel")
    if num_done == tl.num_programs(1) * SPLIT_K - 1:
        tl.store(counters + tile, 0)
        expert = tl.arange(0, EXPERTS)
        choice = tl.arange(0, CHOICES)[None, :]
        bias = tl.load(correction_bias + expert, mask=expert < num_experts, other=0.0)
        for first in range(tile * BLOCK_M, min((tile + 1) * BLOCK_M, num_tokens), ROWS):
            token = first + tl.arange(0, ROWS)[:, None]
            scored = logits + token * num_experts + expert[None, :]
            is_scored = (token < num_tokens) & (expert < num_experts)[None, :]
            sums = tl.zeros((ROWS, EXPERTS), tl.float32)
            for other in tl.static_range(SPLIT_K):
                # Read past the L1 cache, which other processors' stores do not reach.
                sums += tl.load(scored + other * size, mask=is_scored, other=0.0, cache_modifier=".cg")
            chosen, scores, total_score = _choose(
                tl.sigmoid(sums), bias, num_experts, TOP_K, NUM_GROUPS, TOPK_GROUP, CHOICES, GROUPS
            )
            if NORMALISE:
                scores = scores / (total_score + 1e-20)[:, None]
            is_chosen = (token < num_tokens) & (choice < TOP_K)
            places = token * TOP_K + choice
            tl.store(weights + places, scores * factor, mask=is_chosen)
            tl.store(ids + places, chosen.to(tl.int64), mask=is_chosen)
