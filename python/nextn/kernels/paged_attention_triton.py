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
from nextn.kernels.fp8_matmul import widened
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.gpu import jit, tl

TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
SHORT = 16
"""New tokens up to which a sequence is launched apart from longer ones, and its keys are always divided."""
MIN_PART = 4
"""Least steps over keys that are worth a program."""
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
        return AttentionConfig(64 if is_large else 32, 32, num_warps=4, num_stages=4 if is_fp8 else 3)
    block_m = min(max(gpu.next_power_of_2(num_rows), 16), 128)
    num_stages = 3
    if num_rows > 256:  # limited by arithmetic
        block_n, num_stages = (128 if is_large else 64), 2
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
    batch_invariant: bool,
) -> torch.Tensor:
    """One launch if all sequences are short, all are long, or the order is fixed; else one for each kind."""
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] == 0:
        return out
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
        _launch_tiles(q, k_cache, v_cache, layout, scale, out, (shortest, longest), config, batch_invariant)

    if batch_invariant or longest <= SHORT or layout.starts.shape[0] == 1:
        launch(0, longest, longest * group)
    else:
        launch(SHORT, longest, longest * group)
        # Beside prompts, most of the short ones are as short as drafts are.
        launch(0, SHORT, 5 * group)
    return out


def _launch_tiles(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    out: torch.Tensor,
    lengths: tuple[int, int],
    config: AttentionConfig,
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
        # A few rounds of the two or three programs that a processor holds; a sequence's last part may be shorter.
        wanted_items = gpu.cdiv(6 * processors, num_kv_heads)
        is_split = max_parts > 1 and (longest <= SHORT or num_tiles * num_kv_heads <= 2 * processors)
        num_items = num_tiles + min(wanted_items, num_tiles * (max_parts - 1)) if is_split else num_tiles
    sums = maxima = out
    if is_split:
        shape = (num_items, num_kv_heads, config.block_m)
        sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        maxima = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    is_fp8 = k_cache.dtype == FP8
    is_widened = is_fp8 and not gpu.has_fp8_units(q.device)
    caches = [cache.view(torch.uint8) if is_widened else cache for cache in (k_cache, v_cache)]
    sizes = {
        "IS_SPLIT": is_split,
        "INVARIANT": batch_invariant,
        "PART_BLOCKS": part_blocks,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_S": next(size for size in (16, 64, 256, 1024, 1 << 14) if size >= num_seqs),
    }
    items = (layout.starts, layout.cu_seqlens_q, num_seqs, shortest, longest, wanted_items)
    gpu.launch(
        _attend_tiles,
        (num_kv_heads, num_items),
        q,
        *caches,
        out,
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
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        HAS_FIRST_KEY=layout.first_key > 0,
        IS_FP8=is_fp8,
        WIDEN=is_widened,
        PAGE_SIZE=layout.page_size,
        **sizes,
    )
    if is_split:
        gpu.launch(
            _merge_parts,
            (num_tokens, num_kv_heads),
            out,
            sums,
            maxima,
            *items,
            num_items,
            num_warps=4,
            num_stages=4,
            GROUP_ROWS=gpu.next_power_of_2(group),
            **sizes,
        )


@jit
def folded(sums, maxima, totals, other_sums, other_maxima, other_totals):  # type: ignore[no-untyped-def]
    """Two parts' softmax sums in one, as if over all their keys. sums: [M, D]; maxima, totals: [M]

    Written so that every kernel rounds alike: a product and a sum in one instruction, or apart.
    """
    highest = tl.maximum(maxima, other_maxima)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    factor, other_factor = tl.exp2(maxima - shift), tl.exp2(other_maxima - shift)
    totals = tl.fma(totals, factor, other_totals * other_factor)
    wide = tl.broadcast_to(factor[:, None], sums.shape)
    return tl.fma(sums, wide, other_sums * other_factor[:, None]), highest, totals


@jit
def items_of_sequences(  # type: ignore[no-untyped-def]
    starts,
    cu_seqlens_q,
    num_seqs,
    shortest,
    longest,
    wanted_items,
    IS_SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """How many items of work, tiles × parts of its keys, each sequence is [BLOCK_S], and the steps of a part."""
    seqs = tl.arange(0, BLOCK_S)
    inside = seqs < num_seqs
    first = tl.load(cu_seqlens_q + seqs, mask=inside, other=0)
    length = (tl.load(cu_seqlens_q + seqs + 1, mask=inside, other=0) - first).to(tl.int32)
    start = tl.load(starts + seqs, mask=inside, other=0).to(tl.int32)
    tiles = tl.where((length > shortest) & (length <= longest), tl.cdiv(length * GROUP, BLOCK_M), 0)
    blocks = tl.cdiv(start + length, BLOCK_N)
    part_blocks = tl.full((), PART_BLOCKS, tl.int32)
    if IS_SPLIT:
        if not INVARIANT:
            part_blocks = tl.maximum(tl.cdiv(tl.sum(tiles * blocks), wanted_items), PART_BLOCKS)
        tiles *= tl.cdiv(blocks, part_blocks)
    return tiles, part_blocks


@jit
def page_of_keys(pages, keys, num_keys, PAGE_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pages that keys are on; page 0 for those beyond the last. int32, which takes half the registers of int64."""
    return tl.load(pages + (keys.to(tl.uint32) // PAGE_SIZE), mask=keys < num_keys, other=0).to(tl.int32)


@jit
def attend_keys(  # type: ignore[no-untyped-def]
    sums,
    maxima,
    totals,
    queries,
    row_scale,
    positions,
    k_cache,
    v_cache,
    pages,
    first_key,
    num_keys,
    first_block,
    last_block,
    page_stride,
    token_stride,
    MASKED: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr,
    WIDEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go on with the online softmax (Milakov & Gimelshein, 2018) over blocks of keys.

    queries: [M, D]; row_scale: [M], of scores in base 2; positions: [M]; pages: the sequence's row of the page table
    num_keys: how many keys any row may see; MASKED: whether some row may not see all of these blocks' keys
    """
    dims = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, BLOCK_N)
    page = page_of_keys(pages, first_block * BLOCK_N + offsets, num_keys, PAGE_SIZE)
    for block in range(first_block, last_block):
        keys = block * BLOCK_N + offsets
        # PAGE_SIZE is a power of two: the offset is an "and", without a division's care for signs.
        places = (page.to(tl.int64) * page_stride + (keys & (PAGE_SIZE - 1)) * token_stride)[:, None] + dims[None, :]
        # A step ahead, so that loads of keys and values wait for no other.
        page = page_of_keys(pages, keys + BLOCK_N, num_keys, PAGE_SIZE)
        k = tl.load(k_cache + places)
        if MASKED:
            # What is beyond the last key may be anything, also NaN.
            v = tl.load(v_cache + places, mask=(keys < num_keys)[:, None], other=0.0)
        else:
            v = tl.load(v_cache + places)
        if WIDEN:
            k, v = widened(k, queries.dtype), widened(v, queries.dtype)
        else:
            k, v = k.to(queries.dtype), v.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if HAS_FIRST_KEY:
                visible &= (keys >= first_key)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(maxima, tl.max(scores, 1) * row_scale)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        scale = tl.broadcast_to(row_scale[:, None], scores.shape)
        weights = tl.exp2(tl.fma(scores, scale, tl.broadcast_to(-shift[:, None], scores.shape)))
        factor = tl.exp2(maxima - shift)
        totals = tl.fma(totals, factor, tl.sum(weights, 1))
        maxima = highest
        sums = tl.dot(weights.to(queries.dtype), v, sums * factor[:, None], input_precision="ieee")
    return sums, maxima, totals


@jit(
    varying=(
        *("starts", "cu_seqlens_q", "page_table"),
        *("num_seqs", "shortest", "longest", "wanted_items", "num_items", "table_stride"),
    )
)
def _attend_tiles(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    out,
    sums_of_items,
    maxima_of_items,
    starts,
    cu_seqlens_q,
    num_seqs,
    shortest,
    longest,
    wanted_items,
    num_items,
    page_table,
    scale,
    first_key,
    q_stride,
    page_stride,
    token_stride,
    table_stride,
    HAS_FIRST_KEY: tl.constexpr,
    IS_FP8: tl.constexpr,
    WIDEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (KV head, item): what runs together reads all of a token's keys, which lie side by side.

    IS_SPLIT: an item is a tile and a part of its keys, else a tile.
    """
    kv_head, item = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    items, part_blocks = items_of_sequences(
        starts, cu_seqlens_q, num_seqs, shortest, longest, wanted_items,
        IS_SPLIT, INVARIANT, PART_BLOCKS, GROUP, BLOCK_M, BLOCK_N, BLOCK_S,
    )  # fmt: skip
    ends = tl.cumsum(items)
    seq = tl.sum((ends <= item).to(tl.int32))
    if seq >= num_seqs:
        return
    first_row = tl.load(cu_seqlens_q + seq)
    length = (tl.load(cu_seqlens_q + seq + 1) - first_row).to(tl.int32)
    start = tl.load(starts + seq).to(tl.int32)
    item_of_seq = item - tl.max(tl.where(ends <= item, ends, 0))
    num_rows = length * GROUP
    if IS_SPLIT:
        num_parts = tl.cdiv(tl.cdiv(start + length, BLOCK_N), part_blocks)
        tile, part = item_of_seq // num_parts, item_of_seq % num_parts
    else:
        num_parts = 1
        tile = tl.cdiv(num_rows, BLOCK_M) - 1 - item_of_seq  # those with the most keys first

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    tokens = rows // GROUP
    positions = tl.where(is_row, start + tokens, -1)
    places = (first_row + tokens)[:, None] * q_stride
    dims = (kv_head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    queries = tl.load(q + places + dims, mask=is_row[:, None], other=0.0)
    row_scale = tl.full((BLOCK_M,), scale, tl.float32)
    if IS_FP8 and q.dtype.element_ty == tl.bfloat16:
        # Every code is exact in float16, and hardware has no shorter way; so are queries by their power of two.
        wide = queries.to(tl.float32)
        unit = (tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit > 0, unit, 1.0)
        queries = (wide / unit[:, None]).to(tl.float16)
        row_scale *= unit

    num_keys = start + (tl.minimum((tile + 1) * BLOCK_M, num_rows) - 1) // GROUP + 1
    last_block = tl.cdiv(num_keys, BLOCK_N)
    first_block = 0
    if HAS_FIRST_KEY:
        first_block = first_key // BLOCK_N
    if IS_SPLIT:
        first_block = tl.maximum(part * part_blocks, first_block)
        last_block = tl.minimum((part + 1) * part_blocks, last_block)
    sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    maxima = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_M,), tl.float32)
    k_head, v_head = k_cache + kv_head * HEAD_DIM, v_cache + kv_head * HEAD_DIM
    pages = page_table + seq.to(tl.int64) * table_stride
    if INVARIANT and not IS_SPLIT:
        for some in range(first_block // PART_BLOCKS, tl.cdiv(last_block, PART_BLOCKS)):
            part_sums, part_maxima, part_totals = attend_keys(
                tl.zeros((BLOCK_M, HEAD_DIM), tl.float32),
                tl.full((BLOCK_M,), float("-inf"), tl.float32),
                tl.zeros((BLOCK_M,), tl.float32),
                queries, row_scale, positions, k_head, v_head, pages, first_key, num_keys,
                tl.maximum(some * PART_BLOCKS, first_block), tl.minimum((some + 1) * PART_BLOCKS, last_block),
                page_stride, token_stride, True, HAS_FIRST_KEY, WIDEN, PAGE_SIZE, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            sums, maxima, totals = folded(sums, maxima, totals, part_sums, part_maxima, part_totals)
    else:
        if not IS_SPLIT and not HAS_FIRST_KEY:
            # Blocks that every row sees whole need no masks.
            whole = (start + tile * BLOCK_M // GROUP + 1) // BLOCK_N
            sums, maxima, totals = attend_keys(
                sums, maxima, totals, queries, row_scale, positions, k_head, v_head, pages, first_key, num_keys,
                first_block, whole,
                page_stride, token_stride, False, HAS_FIRST_KEY, WIDEN, PAGE_SIZE, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            first_block = whole
        sums, maxima, totals = attend_keys(
            sums, maxima, totals, queries, row_scale, positions, k_head, v_head, pages, first_key, num_keys,
            first_block, last_block,
            page_stride, token_stride, True, HAS_FIRST_KEY, WIDEN, PAGE_SIZE, HEAD_DIM, BLOCK_N,
        )  # fmt: skip

    if num_parts > 1:
        item_places = (item.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(maxima_of_items + item_places, maxima)
        tl.store(maxima_of_items + num_items.to(tl.int64) * num_kv_heads * BLOCK_M + item_places, totals)
        tl.store(sums_of_items + item_places[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], sums)
        return
    # Where the rows are is found again, by numbers read again, so that registers need not keep it through the loops.
    first_row = tl.load(cu_seqlens_q + seq, volatile=True)
    num_rows = (tl.load(cu_seqlens_q + seq + 1, volatile=True) - first_row).to(tl.int32) * GROUP
    rows = tl.minimum(tile, num_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = (first_row + rows // GROUP) * (num_kv_heads * GROUP) + kv_head * GROUP + rows % GROUP
    mean = sums * (1.0 / tl.where(totals > 0, totals, 1.0))[:, None]
    tl.store(
        out + heads[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :],
        mean.to(out.dtype.element_ty),
        mask=(rows < num_rows)[:, None],
    )


@jit(varying=("starts", "cu_seqlens_q", "num_seqs", "shortest", "longest", "wanted_items", "num_items"))
def _merge_parts(  # type: ignore[no-untyped-def]
    out,
    sums_of_items,
    maxima_of_items,
    starts,
    cu_seqlens_q,
    num_seqs,
    shortest,
    longest,
    wanted_items,
    num_items,
    GROUP_ROWS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (token, KV head): adds the parts of the rows of one token, if there are several, in their order."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    seqs = tl.arange(0, BLOCK_S)
    lasts = tl.load(cu_seqlens_q + seqs + 1, mask=seqs < num_seqs, other=2**62)
    seq = tl.sum((lasts <= token).to(tl.int32))
    if seq >= num_seqs:
        return
    first_row = tl.load(cu_seqlens_q + seq)
    length = (tl.load(cu_seqlens_q + seq + 1) - first_row).to(tl.int32)
    start = tl.load(starts + seq).to(tl.int32)
    if (length <= shortest) | (length > longest):
        return
    items, part_blocks = items_of_sequences(
        starts, cu_seqlens_q, num_seqs, shortest, longest, wanted_items,
        IS_SPLIT, INVARIANT, PART_BLOCKS, GROUP, BLOCK_M, BLOCK_N, BLOCK_S,
    )  # fmt: skip
    num_parts = tl.cdiv(tl.cdiv(start + length, BLOCK_N), part_blocks)
    if num_parts == 1:
        return
    heads = tl.arange(0, GROUP_ROWS)
    is_head = heads < GROUP
    rows = (token - first_row.to(tl.int32)) * GROUP + tl.where(is_head, heads, 0)
    first_items = tl.sum(tl.where(seqs < seq, items, 0)) + rows // BLOCK_M * num_parts
    dims = tl.arange(0, HEAD_DIM)
    sums = tl.zeros((GROUP_ROWS, HEAD_DIM), tl.float32)
    maxima = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    totals = tl.zeros((GROUP_ROWS,), tl.float32)
    to_totals = num_items.to(tl.int64) * tl.num_programs(1) * BLOCK_M
    for part in tl.range(0, num_parts, num_stages=4):
        places = ((first_items + part).to(tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M + rows % BLOCK_M
        part_maxima = tl.load(maxima_of_items + places)
        part_totals = tl.load(maxima_of_items + to_totals + places)
        part_sums = tl.load(sums_of_items + places[:, None] * HEAD_DIM + dims[None, :])
        sums, maxima, totals = folded(sums, maxima, totals, part_sums, part_maxima, part_totals)
    num_heads = tl.num_programs(1) * GROUP
    places = token.to(tl.int64) * (num_heads * HEAD_DIM) + (kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    mean = sums * (1.0 / tl.where(totals > 0, totals, 1.0))[:, None]
    tl.store(out + places, mean.to(out.dtype.element_ty), mask=is_head[:, None])
