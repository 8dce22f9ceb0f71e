"""Sort (token, expert) pairs into blocks of rows that share an expert.

Floor: a launch; with many tokens, the ids read once per expert from the L2 cache. Every program counts all the pairs
itself, so that nothing has to be exchanged between programs, and the order is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor

MAX_CHUNK = 2048


@dataclass(frozen=True)
class MoeAlignment:
    """Which rows are multiplied with which expert.

    A token has top_k pairs, and one more if there is a shared expert: pair p belongs to token p // pairs_per_token.

    experts: [num_blocks] int32, each block's expert; -1 for blocks that are not needed, whose pairs are undefined
    pairs: [num_blocks, block_m] int32, each block's pairs in ascending order, then num_pairs where there are no more;
        None for a single token, whose pair p is all of block p, and whose routed experts alone are in ``experts``
    """

    experts: torch.Tensor
    pairs: torch.Tensor | None
    num_blocks: int
    block_m: int
    num_pairs: int
    pairs_per_token: int


def max_blocks(num_tokens: int, top_k: int, num_routed: int, block_m: int, *, has_shared: bool) -> int:
    """Most blocks that the pairs can fill, whatever the choice of experts."""
    chosen = num_tokens * top_k
    # Most blocks begin where every expert has one row: each further block takes block_m more.
    routed = chosen if chosen <= num_routed else num_routed + (chosen - num_routed) // block_m
    return routed + (gpu.cdiv(num_tokens, block_m) if has_shared else 0)


def moe_align(expert_ids: torch.Tensor, num_routed: int, block_m: int, *, has_shared: bool) -> MoeAlignment:
    """Blocks in the order of experts; the shared one, which every token takes, is the last.

    expert_ids: [T, K] int64, in [0, num_routed), a token's all different
    """
    num_tokens, top_k = expert_ids.shape
    num_blocks = max_blocks(num_tokens, top_k, num_routed, block_m, has_shared=has_shared)
    pairs_per_token = top_k + has_shared
    num_pairs = num_tokens * pairs_per_token
    if num_tokens == 1:
        return MoeAlignment(expert_ids.reshape(-1), None, num_blocks, block_m, num_pairs, pairs_per_token)
    experts = torch.empty(num_blocks, dtype=torch.int32, device=expert_ids.device)
    pairs = torch.empty(num_blocks, block_m, dtype=torch.int32, device=expert_ids.device)
    if not gpu.suits(expert_ids):
        _align(expert_ids, experts, pairs, num_routed, num_pairs, has_shared=has_shared)
    elif num_blocks:
        chunk = min(max(gpu.next_power_of_2(expert_ids.numel()), 128), MAX_CHUNK)
        gpu.launch(
            _align_expert,
            (num_routed + has_shared,),
            expert_ids.contiguous(),
            experts,
            pairs,
            expert_ids.numel(),
            num_tokens,
            num_routed,
            num_blocks,
            num_warps=chunk // 256 or 1,
            TOP_K=top_k,
            HAS_SHARED=has_shared,
            BLOCK_M=block_m,
            BINS=gpu.next_power_of_2(num_routed + 1),
            CHUNK=chunk,
        )
    return MoeAlignment(experts, pairs, num_blocks, block_m, num_pairs, pairs_per_token)


def _align(
    expert_ids: torch.Tensor,
    experts: torch.Tensor,
    pairs: torch.Tensor,
    num_routed: int,
    num_pairs: int,
    *,
    has_shared: bool,
) -> None:
    """The torch reference."""
    shared = [expert_ids.new_full((expert_ids.shape[0], 1), num_routed)] if has_shared else []
    all_ids = torch.cat([expert_ids, *shared], 1).view(-1)
    experts.fill_(-1)
    pairs.fill_(num_pairs)
    block = 0
    for expert in all_ids.unique().tolist():
        for rows in (all_ids == expert).nonzero().view(-1).split(pairs.shape[1]):
            experts[block] = expert
            pairs[block, : rows.numel()] = rows
            block += 1


@jit(varying=("num_ids", "num_tokens", "num_blocks"))
def _align_expert(  # type: ignore[no-untyped-def]
    expert_ids,
    experts,
    pairs,
    num_ids,
    num_tokens,
    num_routed,
    num_blocks,
    TOP_K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program e places expert e's pairs; the last one also marks the blocks that are not needed."""
    wait_for_predecessor(EARLY)
    expert = tl.program_id(0)
    inside = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, num_ids, CHUNK):
        ids = tl.load(expert_ids + first + inside, mask=first + inside < num_ids, other=BINS - 1).to(tl.int32)
        counts += tl.histogram(ids, BINS)
    bins = tl.arange(0, BINS)
    counts = tl.where(bins < num_routed, counts, 0)
    first_block = tl.sum(tl.where(bins < expert, (counts + BLOCK_M - 1) // BLOCK_M, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    slots = pairs + first_block * BLOCK_M

    pairs_per_token: tl.constexpr = TOP_K + HAS_SHARED
    if expert < num_routed:
        num_placed = 0
        for first in range(0, num_ids, CHUNK):
            index = first + inside
            ids = tl.load(expert_ids + index, mask=index < num_ids, other=-1).to(tl.int32)
            is_mine = (ids == expert).to(tl.int32)
            place = num_placed + tl.cumsum(is_mine, 0) - 1
            tl.store(slots + place, index // TOP_K * pairs_per_token + index % TOP_K, mask=is_mine > 0)
            num_placed += tl.sum(is_mine, 0)
    else:
        count = num_tokens
        for first in range(0, num_tokens, CHUNK):
            token = first + inside
            tl.store(slots + token, token * pairs_per_token + TOP_K, mask=token < num_tokens)

    num_mine = tl.cdiv(count, BLOCK_M)
    rest = count + tl.arange(0, BLOCK_M)
    tl.store(slots + rest, num_tokens * pairs_per_token, mask=rest < num_mine * BLOCK_M)
    for first in range(0, num_mine, CHUNK):
        tl.store(experts + first_block + first + inside, expert, mask=first + inside < num_mine)
    if expert == tl.num_programs(0) - 1:
        for first in range(first_block + num_mine, num_blocks, CHUNK):
            block = first + inside
            tl.store(experts + block, -1, mask=block < num_blocks)
