"""How attention's work is divided into items, and how the sums of a tile's parts become its result, in Triton.

An item is a tile of a sequence's rows, or a tile and a part of its keys. The merge's floor: the parts' sums in float32,
read once. It is limited by latency, since parts are few.
"""

from __future__ import annotations

from nextn.kernels.fp8_quantize import quantized_rows
from nextn.kernels.gpu import jit, tl, wait_for_predecessor


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
    # Past the L1 cache, which may be emptied for a kernel no earlier than when it waits for its predecessor.
    first = tl.load(cu_seqlens_q + seqs, mask=inside, other=0, cache_modifier=".cg")
    end = tl.load(cu_seqlens_q + seqs + 1, mask=inside, other=0, cache_modifier=".cg")
    length = (end - first).to(tl.int32)
    start = tl.load(starts + seqs, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
    tiles = tl.where((length > shortest) & (length <= longest), tl.cdiv(length * GROUP, BLOCK_M), 0)
    blocks = tl.cdiv(start + length, BLOCK_N)
    part_blocks = tl.full((), PART_BLOCKS, tl.int32)
    if IS_SPLIT:
        if not INVARIANT:
            part_blocks = tl.maximum(tl.cdiv(tl.sum(tiles * blocks), wanted_items), PART_BLOCKS)
        tiles *= tl.cdiv(blocks, part_blocks)
    return tiles, part_blocks


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
def store_means(means, out, scales, rows, is_row, dtype: tl.constexpr, QUANTIZE: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store what attention comes to, rounded to dtype; with QUANTIZE in FP8 then, with a scale per row.

    means: [M, HEAD_DIM] float32; rows: [M], (token, head) pairs
    """
    places = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    rounded = means.to(dtype)
    if QUANTIZE:
        codes, each = quantized_rows(rounded.to(tl.float32))
        tl.store(scales + rows, each, mask=is_row)
        tl.store(out + places, codes, mask=is_row[:, None])
    else:
        tl.store(out + places, rounded, mask=is_row[:, None])


@jit(varying=("starts", "cu_seqlens_q", "num_seqs", "shortest", "longest", "wanted_items", "num_items"))
def merge_parts(  # type: ignore[no-untyped-def]
    q,
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
    QUANTIZE: tl.constexpr,
    CHUNK: tl.constexpr,
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
    """Program (token, head): adds the parts of its row, if there are several, CHUNK at a time and in their order.

    q: only says what type the result is rounded to
    """
    token, head = tl.program_id(0), tl.program_id(1)
    seqs = tl.arange(0, BLOCK_S)
    lasts = tl.load(cu_seqlens_q + seqs + 1, mask=seqs < num_seqs, other=2**62, cache_modifier=".cg")
    seq = tl.sum((lasts <= token).to(tl.int32))
    wait_for_predecessor(EARLY)
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
    num_heads = tl.num_programs(1)
    num_kv_heads = num_heads // GROUP
    row = (token - first_row.to(tl.int32)) * GROUP + head % GROUP
    first_item = tl.sum(tl.where(seqs < seq, items, 0)) + row // BLOCK_M * num_parts
    to_totals = num_items.to(tl.int64) * num_kv_heads * BLOCK_M
    dims = tl.arange(0, HEAD_DIM)
    sums = tl.zeros((1, HEAD_DIM), tl.float32)
    maxima = tl.full((1,), float("-inf"), tl.float32)
    totals = tl.zeros((1,), tl.float32)
    for first in range(0, num_parts, CHUNK):
        parts = first + tl.arange(0, CHUNK)
        is_part = parts < num_parts
        places = ((first_item + parts).to(tl.int64) * num_kv_heads + head // GROUP) * BLOCK_M + row % BLOCK_M
        part_maxima = tl.load(maxima_of_items + places, mask=is_part, other=float("-inf"))
        part_totals = tl.load(maxima_of_items + to_totals + places, mask=is_part, other=0.0)
        part_sums = tl.load(
            sums_of_items + places[:, None] * HEAD_DIM + dims[None, :], mask=is_part[:, None], other=0.0
        )
        highest = tl.max(part_maxima, 0)
        factors = tl.exp2(part_maxima - tl.where(highest == float("-inf"), 0.0, highest))
        chunk_sums = tl.sum(part_sums * factors[:, None], 0)[None, :]
        chunk_totals = tl.sum(part_totals * factors, 0) + tl.zeros((1,), tl.float32)
        chunk_maxima = highest + tl.zeros((1,), tl.float32)
        sums, maxima, totals = folded(sums, maxima, totals, chunk_sums, chunk_maxima, chunk_totals)
    mean = sums * (1.0 / tl.where(totals > 0, totals, 1.0))[:, None]
    place = token.to(tl.int64) * num_heads + head + tl.zeros((1,), tl.int64)
    store_means(mean, out, scales, place, place >= 0, q.dtype.element_ty, QUANTIZE, HEAD_DIM)
