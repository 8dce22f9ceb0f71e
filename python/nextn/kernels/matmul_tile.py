"""What a program of a matrix product does with its tile: where it lies, a step's product, its scales, the store."""

from __future__ import annotations

from nextn.kernels.fp8_dequantize import widened
from nextn.kernels.gpu import jit, tl
from nextn.kernels.split_k import is_last_of_split, sum_of_split


@jit
def tile_at(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first row and the first column of an output tile.

    Eight tiles of rows share each tile of the weight while it is in the L2 cache.
    """
    num_n = tl.cdiv(n, BLOCK_N)
    band = tile // (8 * num_n)
    height = min(tl.cdiv(m, BLOCK_M) - band * 8, 8)
    inside = tile % (8 * num_n)
    return (band * 8 + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@jit
def product(x, w, TRANSPOSED: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """x wᵀ [BLOCK_M, BLOCK_N], or its transpose, of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], in float32.

    The tensor cores add FP8 products with few bits: such a sum is kept apart from any other until it has left them.
    """
    if WIDEN:
        w = widened(w, x.dtype)
    IMPRECISE: tl.constexpr = x.shape[1] if x.dtype.primitive_bitwidth == 8 else 0
    if TRANSPOSED:
        total = tl.dot(w, tl.trans(x), max_num_imprecise_acc=IMPRECISE)
    else:
        total = tl.dot(x, tl.trans(w), max_num_imprecise_acc=IMPRECISE)
    return total


@jit
def scaled_by_group(  # type: ignore[no-untyped-def]
    partial,
    x_scale,
    weight_scale,
    rows,
    column,
    columns,
    group,
    x_scale_stride,
    weight_scale_stride,
    GROUP_N: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    WEIGHT_BY_GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A step's products times the scales of its group along K. column: the tile's first.

    WEIGHT_BY_GROUP: whether the weight has some; else x has
    """
    if not WEIGHT_BY_GROUP:
        scale = tl.load(x_scale + rows * x_scale_stride + group)
        partial *= scale[None, :] if TRANSPOSED else scale[:, None]
    elif GROUP_N % BLOCK_N == 0:  # one scale for all of the tile's columns
        scale = tl.load(weight_scale + column // GROUP_N * weight_scale_stride + group)
        if HAS_X_SCALE:
            scale *= tl.load(x_scale + rows * x_scale_stride + group)
            scale = scale[None, :] if TRANSPOSED else scale[:, None]
        partial *= scale
    else:
        scale = tl.load(weight_scale + columns // GROUP_N * weight_scale_stride + group)
        partial *= scale[:, None] if TRANSPOSED else scale[None, :]
        if HAS_X_SCALE:
            scale = tl.load(x_scale + rows * x_scale_stride + group)
            partial *= scale[None, :] if TRANSPOSED else scale[:, None]
    return partial


@jit
def store_tile(  # type: ignore[no-untyped-def]
    total,
    rows,
    columns,
    out,
    x_scale,
    weight_scale,
    bias,
    residual,
    partials,
    counters,
    m,
    n,
    x_scale_stride,
    weight_scale_stride,
    HAS_X_SCALE: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum over the programs that share a tile, scale per row and channel, add bias and residual, round, store.

    total: what this program has summed, [BLOCK_M, BLOCK_N] or its transpose
    """
    if TRANSPOSED:
        total = tl.trans(total)
    is_last = True
    if SPLIT:
        is_last = is_last_of_split(total, partials, counters, BLOCK_M, BLOCK_N)
    if is_last:
        if SPLIT:
            total = sum_of_split(partials, BLOCK_M, BLOCK_N)
        safe_columns = tl.where(columns < n, columns, 0)
        if HAS_WEIGHT_SCALE:
            total *= tl.load(weight_scale + safe_columns * weight_scale_stride)[None, :]
        if HAS_X_SCALE:
            total *= tl.load(x_scale + tl.where(rows < m, rows, 0) * x_scale_stride)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + safe_columns).to(tl.float32)[None, :]
        places = rows.to(tl.int64)[:, None] * n + columns[None, :]
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        if HAS_RESIDUAL:
            total += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)
