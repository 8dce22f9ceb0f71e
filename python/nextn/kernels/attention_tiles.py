"""Attention's tiles in Triton: one tile's queries against its keys, or a part of them; launched by
paged_attention_triton.py.

Floor: paged_attention.py's. Limited by memory where queries are few, and then by how many bytes are asked for at once:
registers and shared memory decide how many programs share a processor.
"""

from __future__ import annotations

from nextn.kernels.attention_parts import folded, items_of_sequences, store_means
from nextn.kernels.fp8_dequantize import widened
from nextn.kernels.gpu import jit, prefetch_rows, tl, wait_for_predecessor

SHARE_ROWS = 64
"""How many runs of bytes a program that has no keys asks for, of the weight that is read next."""


@jit
def page_of_keys(pages, keys, num_keys, PAGE_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pages that keys are on; page 0 for those beyond the last. int32, which takes half the registers of int64."""
    return tl.load(pages + (keys.to(tl.uint32) // PAGE_SIZE), mask=keys < num_keys, other=0).to(tl.int32)


@jit
def float16_of_pairs(pairs, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of the two float8_e4m3fn codes in each uint16, first that of its low byte, in float16, exactly.

    WIDEN: without the hardware's conversion. Put into float16's fields, a code stands for its value · 2⁻⁸.
    """
    if WIDEN:
        low, high = pairs << 8, pairs
        low_bits, high_bits = (low & 0x8000) | ((low & 0x7F00) >> 1), (high & 0x8000) | ((high & 0x7F00) >> 1)
        first = low_bits.to(tl.float16, bitcast=True) * 256.0
        second = high_bits.to(tl.float16, bitcast=True) * 256.0
    else:
        first = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return first, second


@jit
def attend_keys(  # type: ignore[no-untyped-def]
    sums,
    odd_sums,
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
    PAIRED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go on with the online softmax (Milakov & Gimelshein, 2018) over blocks of keys.

    sums: [M, D]; or if PAIRED its even columns, and odd_sums its odd ones
    queries: [M, D]; row_scale: [M], of scores in base 2; positions: [M]; pages: the sequence's row of the page table
    num_keys: how many keys any row may see; MASKED: whether some row may not see all of these blocks' keys
    PAIRED: values are FP8 and are taken in pairs
    """
    dims = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, BLOCK_N)
    page = page_of_keys(pages, first_block * BLOCK_N + offsets, num_keys, PAGE_SIZE)
    for block in range(first_block, last_block):
        keys = block * BLOCK_N + offsets
        # PAGE_SIZE is a power of two: the offset is an "and", without a division's care for signs.
        places = (page.to(tl.int64) * page_stride + (keys & (PAGE_SIZE - 1)) * token_stride)[:, None]
        # A step ahead, so that loads of keys and values wait for no other.
        page = page_of_keys(pages, keys + BLOCK_N, num_keys, PAGE_SIZE)
        k = tl.load(k_cache + places + dims[None, :])
        if PAIRED:
            v_places = (v_cache + places).to(tl.pointer_type(tl.uint16)) + tl.arange(0, HEAD_DIM // 2)[None, :]
        else:
            v_places = v_cache + places + dims[None, :]
        # What is beyond the last key may be anything, also NaN.
        v = tl.load(v_places, mask=(keys < num_keys)[:, None], other=0.0) if MASKED else tl.load(v_places)
        k = widened(k, queries.dtype) if WIDEN else k.to(queries.dtype)
        if not PAIRED:
            v = widened(v, queries.dtype) if WIDEN else v.to(queries.dtype)
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
        weights = weights.to(queries.dtype)
        if PAIRED:
            even, odd = float16_of_pairs(v, WIDEN)
            sums = tl.dot(weights, even, sums * factor[:, None])
            odd_sums = tl.dot(weights, odd, odd_sums * factor[:, None])
        else:
            sums = tl.dot(weights, v, sums * factor[:, None], input_precision="ieee")
    return sums, odd_sums, maxima, totals


@jit(
    varying=(
        *("starts", "cu_seqlens_q", "page_table"),
        *("num_seqs", "shortest", "longest", "wanted_items", "num_items", "table_stride"),
    )
)
def attend_tiles(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    out,
    scales,
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
    next_weight,
    num_shares,
    HAS_FIRST_KEY: tl.constexpr,
    IS_FP8: tl.constexpr,
    WIDEN: tl.constexpr,
    PAIRED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PREFETCH: tl.constexpr,
    SHARE_ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (KV head, item): what runs together reads all of a token's keys, which lie side by side.

    IS_SPLIT: an item is a tile and a part of its keys, else a tile.
    PREFETCH: how many bytes of the next weight are asked for in a row, by programs without an item; 0 for none
    """
    kv_head, item = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    items, part_blocks = items_of_sequences(
        starts, cu_seqlens_q, num_seqs, shortest, longest, wanted_items,
        IS_SPLIT, INVARIANT, PART_BLOCKS, GROUP, BLOCK_M, BLOCK_N, BLOCK_S,
    )  # fmt: skip
    ends = tl.cumsum(items)
    seq = tl.sum((ends <= item).to(tl.int32))
    if PREFETCH > 0:
        share = (tl.num_programs(1) - 1 - item) * num_kv_heads + kv_head
        if (seq >= num_seqs) & (share < num_shares):
            run: tl.constexpr = PREFETCH // (next_weight.dtype.element_ty.primitive_bitwidth // 8)
            prefetch_rows(next_weight + (share * SHARE_ROWS + tl.arange(0, SHARE_ROWS)) * run, run, PREFETCH)
    wait_for_predecessor(EARLY)  # lengths are older than the rotated queries
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
    COLUMNS: tl.constexpr = HEAD_DIM // 2 if PAIRED else HEAD_DIM
    sums, odd_sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32), tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    maxima = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_M,), tl.float32)
    k_head, v_head = k_cache + kv_head * HEAD_DIM, v_cache + kv_head * HEAD_DIM
    pages = page_table + seq.to(tl.int64) * table_stride
    if INVARIANT and not IS_SPLIT:
        for some in range(first_block // PART_BLOCKS, tl.cdiv(last_block, PART_BLOCKS)):
            part_sums, part_odd_sums, part_maxima, part_totals = attend_keys(
                tl.zeros((BLOCK_M, COLUMNS), tl.float32), tl.zeros((BLOCK_M, COLUMNS), tl.float32),
                tl.full((BLOCK_M,), float("-inf"), tl.float32),
                tl.zeros((BLOCK_M,), tl.float32),
                queries, row_scale, positions, k_head, v_head, pages, first_key, num_keys,
                tl.maximum(some * PART_BLOCKS, first_block), tl.minimum((some + 1) * PART_BLOCKS, last_block),
                page_stride, token_stride, True, HAS_FIRST_KEY, WIDEN, PAIRED, PAGE_SIZE, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            if PAIRED:
                odd_sums, _, _ = folded(odd_sums, maxima, totals, part_odd_sums, part_maxima, part_totals)
            sums, maxima, totals = folded(sums, maxima, totals, part_sums, part_maxima, part_totals)
    else:
        if not IS_SPLIT and not HAS_FIRST_KEY:
            # Blocks that every row sees whole need no masks.
            whole = (start + tile * BLOCK_M // GROUP + 1) // BLOCK_N
            sums, odd_sums, maxima, totals = attend_keys(
                sums, odd_sums, maxima, totals, queries, row_scale, positions, k_head, v_head, pages,
                first_key, num_keys, first_block, whole,
                page_stride, token_stride, False, HAS_FIRST_KEY, WIDEN, PAIRED, PAGE_SIZE, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            first_block = whole
        sums, odd_sums, maxima, totals = attend_keys(
            sums, odd_sums, maxima, totals, queries, row_scale, positions, k_head, v_head, pages,
            first_key, num_keys, first_block, last_block,
            page_stride, token_stride, True, HAS_FIRST_KEY, WIDEN, PAIRED, PAGE_SIZE, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
    if PAIRED:
        sums = tl.interleave(sums, odd_sums)

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
    store_means(mean, out, scales, heads, rows < num_rows, q.dtype.element_ty, QUANTIZE, HEAD_DIM)
