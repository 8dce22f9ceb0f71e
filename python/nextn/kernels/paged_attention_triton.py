"""Attention of ragged new tokens over paged KV, in Triton; called through paged_attention.py.

A sequence's (new token, query head) pairs of one KV head are the rows of tiles, so that a key is read once for all the
query heads that share it. Where tiles are few, their keys are divided too, into parts of about equal cost over the
whole batch; a second launch adds the parts. Every program finds its own tile from the lengths in device memory, so that
grids depend on shapes alone, and sequences without tokens cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nextn.kernels import gpu
from nextn.kernels.attention_layout import AttentionLayout
from nextn.kernels.attention_parts import merge_parts
from nextn.kernels.attention_tiles import SHARE_ROWS, attend_tiles
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.matmul_config import SMALL_M

TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
SHORT = 16
"""New tokens up to which a sequence is launched apart from longer ones, and its keys are always divided."""
SEQS_AT_ONCE = (16, 64, 256, 1024, 1 << 14)
"""As many sequences as a program looks through to find its own: the least that is enough."""
MIN_PART = 4
"""Least steps over keys that are worth a program."""
ITEMS_PER_PROCESSOR = 6
"""A few rounds of the two or three programs that a processor holds; a sequence's last part may be shorter."""
PARTS_AT_ONCE = 16
"""Parts that the merge adds up in one go."""
AHEAD_BYTES = 16 << 20
"""Of the weight that is read next, at most: what memory delivers until attention is done, a third of the L2 cache."""
INVARIANT_PART = 4096
"""Keys that are added up in a row before their sum joins the others', where the order may not depend on the batch."""


@dataclass(frozen=True)
class AttentionConfig:
    """How the work is cut up.

    block_m: rows of a tile, (new token, query head) pairs of one KV head; block_n: keys per step
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_config(
    num_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    shared_memory: int,
    *,
    batch_invariant: bool,
) -> AttentionConfig:
    """So that registers do not spill, and two programs or more share a processor where memory is the limit.

    num_rows: (new token, query head) pairs of the longest sequence and one KV head
    shared_memory: bytes that a program can have
    """
    if dtype == torch.float32:  # no tensor cores
        return AttentionConfig(16, 32, num_warps=4, num_stages=1)
    is_large, is_fp8 = shared_memory >= 200 << 10, kv_dtype == FP8
    if batch_invariant:
        if is_large:
            return AttentionConfig(64, 32, num_warps=4, num_stages=4 if is_fp8 else 3)
        return AttentionConfig(32, 32, num_warps=4, num_stages=3)
    block_m = min(max(gpu.next_power_of_2(num_rows), 16), 128)
    num_stages = 3
    if num_rows > 256:
        # Limited by arithmetic; keys and values have to be asked for two steps ahead to come in time.
        block_n, num_stages = 64, 3 if shared_memory >= 144 << 10 else 2
    elif block_m <= 32:
        block_n = 128 if is_fp8 else 64
    else:
        block_n, num_stages = (64 if is_large else 32), (4 if is_fp8 else 3)
    if head_dim > 128:
        block_n //= 2
    return AttentionConfig(block_m, block_n, 8 if block_m == 128 else 4, num_stages)


def launch_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    next_weight: torch.Tensor | None = None,
    *,
    quantize: bool = False,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch if all sequences are short, all are long, or the order is fixed; else one for each kind.

    Returns the result [T, num_heads, head_dim], and with ``quantize`` its scales [T, num_heads].
    """
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=FP8 if quantize else q.dtype, device=q.device)
    scales = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if quantize else None
    if q.shape[0] == 0:
        return out, scales
    longest, group = layout.max_query_len, q.shape[1] // k_cache.shape[2]

    def launch(shortest: int, longest: int, num_rows: int) -> None:
        config = choose_config(
            num_rows,
            q.shape[2],
            q.dtype,
            k_cache.dtype,
            gpu.shared_memory(q.device),
            batch_invariant=batch_invariant,
        )
        lengths = (shortest, longest)
        _launch_tiles(q, k_cache, v_cache, layout, scale, out, scales, lengths, config, next_weight, batch_invariant)

    if batch_invariant or longest <= SHORT or layout.starts.shape[0] == 1:
        launch(0, longest, longest * group)
    else:
        launch(SHORT, longest, longest * group)
        # Beside prompts, most of the short ones are as short as drafts are.
        launch(0, SHORT, 5 * group)
    return out, scales


def _launch_tiles(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    lengths: tuple[int, int],
    config: AttentionConfig,
    next_weight: torch.Tensor | None,
    batch_invariant: bool,
) -> None:
    """Attend for the sequences with more than lengths[0] and up to lengths[1] new tokens."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_seqs = k_cache.shape[2], layout.starts.shape[0]
    group = num_heads // num_kv_heads
    shortest, longest = lengths
    # Every sequence's last tile may be partly filled.
    num_tiles = min(
        num_seqs * gpu.cdiv(longest * group, config.block_m), num_tokens * group // config.block_m + num_seqs
    )
    num_blocks = gpu.cdiv(layout.page_table.shape[1] * layout.page_size, config.block_n)
    processors = gpu.num_processors(q.device)
    if batch_invariant:
        part_blocks = max(INVARIANT_PART // config.block_n, 1)
        max_parts = gpu.cdiv(num_blocks, part_blocks)
        wanted_items = 0
        # Where tiles alone keep the card busy, a program adds up its tile's parts by itself, in the same order.
        is_split = num_tiles * num_kv_heads <= processors and max_parts > 1
        num_items = num_tiles * max_parts if is_split else num_tiles
    else:
        part_blocks = MIN_PART
        max_parts = gpu.cdiv(num_blocks, part_blocks)
        wanted_items = gpu.cdiv(ITEMS_PER_PROCESSOR * processors, num_kv_heads)
        is_split = max_parts > 1 and (longest <= SHORT or num_tiles * num_kv_heads <= 2 * processors)
        num_items = num_tiles + min(wanted_items, num_tiles * (max_parts - 1)) if is_split else num_tiles
    sums = maxima = out
    if is_split:
        shape = (num_items, num_kv_heads, config.block_m)
        sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        maxima = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    is_fp8 = k_cache.dtype == FP8
    # Warps that multiply by themselves read values transposed, which hardware does for 16 bits at once, not for 8.
    is_paired = (
        is_fp8
        and q.dtype.itemsize == 2
        and head_dim >= 32
        and (config.block_m <= 32 or not gpu.has_descriptors(q.device))
    )
    is_widened = is_fp8 and not gpu.has_fp8_units(q.device)
    caches = [cache.view(torch.uint8) if is_widened else cache for cache in (k_cache, v_cache)]
    sizes = {
        "QUANTIZE": scales is not None,
        "IS_SPLIT": is_split,
        "INVARIANT": batch_invariant,
        "PART_BLOCKS": part_blocks,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_S": next(size for size in SEQS_AT_ONCE if size >= num_seqs),
    }
    prefetch = 0
    if next_weight is not None and is_split and num_tokens <= SMALL_M:
        prefetch = gpu.prefetch_bytes(next_weight)
    ahead = out if next_weight is None or not prefetch else next_weight
    num_shares = min(AHEAD_BYTES, ahead.nbytes) // (SHARE_ROWS * prefetch) if prefetch else 0
    num_programs = max(num_items, gpu.cdiv(num_shares, num_kv_heads))
    items = (layout.starts, layout.cu_seqlens_q, num_seqs, shortest, longest, wanted_items)
    gpu.launch(
        attend_tiles,
        (num_kv_heads, num_programs),
        q,
        *caches,
        out,
        out if scales is None else scales,
        sums,
        maxima,
        *items,
        num_items,
        layout.page_table,
        scale * math.log2(math.e),
        layout.first_key,
        q.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        layout.page_table.stride(0),
        ahead,
        num_shares,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        HAS_FIRST_KEY=layout.first_key > 0,
        IS_FP8=is_fp8,
        WIDEN=is_widened,
        PAIRED=is_paired,
        PAGE_SIZE=layout.page_size,
        PREFETCH=prefetch,
        SHARE_ROWS=SHARE_ROWS,
        **sizes,
    )
    if is_split:
        gpu.launch(
            merge_parts,
            (num_tokens, num_heads),
            q,
            out,
            out if scales is None else scales,
            sums,
            maxima,
            *items,
            num_items,
            num_warps=4,
            num_stages=2,
            CHUNK=1 if batch_invariant else PARTS_AT_ONCE,
            **sizes,
        )
