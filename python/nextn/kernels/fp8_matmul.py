"""Products of FP8, bfloat16 or float16 weights with activations, accumulated in float32.

Floor: the weight's bytes at small M, limited by memory; 2 · M · N · K FLOPs at large M, limited by arithmetic.

One Triton kernel serves all of it. With few rows it computes the transposed product, so that the weight's rows fill
the tensor cores' tall side, and splits K over several programs, of which the last to finish adds the others' partial
sums in a fixed order. On cards without FP8 units, or for wide activations, codes are widened in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, prefetch_rows, tl, wait_for_predecessor

SMALL_M = 64
"""Up to this many rows, the product is limited by reading the weight."""
MAX_TILES = 1 << 14
"""Size of a counter buffer: most output tiles of a product whose K is split."""
MAX_SPLIT_K = 8
MIN_ROWS_FOR_DESCRIPTORS = 1024
"""From here on, copies by descriptor save more on the card than they cost on the host."""


@dataclass(frozen=True)
class MatmulConfig:
    """How a product is cut up.

    block_m, block_n: a program's output tile; block_k: a step along K; split_k: programs that share a tile's K
    transposed: whether the tile is computed as [block_n, block_m]
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    transposed: bool
    num_warps: int
    num_stages: int


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """weight · scale in float32.

    weight: [N, K] float8_e4m3fn
    scale: [N, 1] per channel, one element per tensor, or [⌈N / block_n⌉, ⌈K / block_k⌉] with ``block``
    Returns [N, K] float32.
    """
    if block is None:
        return weight.float() * (scale if scale.numel() > 1 else scale.view(()))
    rows = torch.arange(weight.shape[0], device=weight.device) // block[0]
    columns = torch.arange(weight.shape[1], device=weight.device) // block[1]
    return weight.float() * scale.index_select(0, rows).index_select(1, columns)


def w8a8_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """(x · x_scale) (weight · weight_scale)ᵀ + bias + residual, the scales applied to the float32 sum.

    x: [M, K] float8_e4m3fn with x_scale [M, 1] float32 or one element; or bfloat16 or float16 without a scale
    weight: [N, K] float8_e4m3fn; weight_scale: [N, 1] float32, or one element
    bias: [N]; residual: [M, N]
    counters: [MAX_TILES] int32 of zeros, which are zeros again afterwards; made where not given
    batch_invariant: add in an order that does not depend on M
    Returns [M, N] in out_dtype.
    """
    if gpu.suits(x, weight):
        return _launch_matmul(
            x, x_scale, weight, weight_scale, None, bias, residual, out_dtype, counters, batch_invariant
        )
    out = (x.float() @ weight.float().t()) * weight_scale.view(1, -1)
    return _finished(out if x_scale is None else out * x_scale, bias, residual, out_dtype)


def block_fp8_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    block: tuple[int, int],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Σ over blocks of K of (x · weightᵀ) · x_scale · weight_scale + bias + residual (DeepSeek-V3, section 3.3.2).

    x: [M, K] float8_e4m3fn with x_scale [M, ⌈K / block_k⌉] float32; or bfloat16 or float16 without a scale
    weight: [N, K] float8_e4m3fn; weight_scale: [⌈N / block_n⌉, ⌈K / block_k⌉] float32
    Others as for ``w8a8_matmul``. Triton serves a block_k that is a power of two, from 16 on, or 32 for FP8 x.
    Returns [M, N] in out_dtype.
    """
    block_n, block_k = block
    # FP8 units multiply 32 elements along K at least.
    if gpu.suits(x, weight) and block_k >= 32 // x.dtype.itemsize and block_k == gpu.next_power_of_2(block_k):
        return _launch_matmul(
            x, x_scale, weight, weight_scale, block, bias, residual, out_dtype, counters, batch_invariant
        )
    out = weight_scale.new_zeros(x.shape[0], weight.shape[0])
    rows = torch.arange(weight.shape[0], device=weight.device) // block_n
    for j, first in enumerate(range(0, x.shape[1], block_k)):
        columns = slice(first, first + block_k)
        partial = x[:, columns].float() @ weight[:, columns].float().t() * weight_scale[rows, j]
        out += partial if x_scale is None else partial * x_scale[:, j : j + 1]
    return _finished(out, bias, residual, out_dtype)


def wide_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x weightᵀ + bias + residual, of weights that are not quantized.

    x: [M, K] and weight: [N, K] of one dtype; bias: [N]; residual: [M, N]
    out_dtype: x's where not given
    counters, batch_invariant: as for ``w8a8_matmul``
    Triton serves few rows, and asks for batch invariance or for a wider result; cuBLAS serves the rest.
    Returns [M, N] in out_dtype.
    """
    dtype = out_dtype or x.dtype
    if not gpu.suits(x, weight) or x.dtype.itemsize != 2:
        return _finished(x.float() @ weight.float().t(), bias, residual, dtype)
    if batch_invariant or x.shape[0] <= SMALL_M or dtype != x.dtype:
        return _launch_matmul(x, None, weight, None, None, bias, residual, dtype, counters, batch_invariant)
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def _finished(
    out: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = out if bias is None else out + bias.float()
    return (out if residual is None else out + residual.float()).to(dtype)


@lru_cache(maxsize=1 << 14)
def choose_config(
    m: int,
    n: int,
    k: int,
    *,
    x_bytes: int,
    weight_bytes: int,
    processors: int,
    shared_memory: int,
    batch_invariant: bool = False,
) -> MatmulConfig:
    """How to cut up [m, k] · [n, k]ᵀ, from the shapes alone.

    x_bytes, weight_bytes: of an element
    processors: streaming multiprocessors of the card; shared_memory: bytes a program can have of it
    """
    few = batch_invariant or m <= SMALL_M
    block_k = 128 if weight_bytes == 1 and (x_bytes == 1 or few) else 64
    num_steps = gpu.cdiv(k, block_k)
    max_split = min(max(num_steps // 4, 1), MAX_SPLIT_K)
    if few:
        block_m = SMALL_M if batch_invariant else max(gpu.next_power_of_2(m), 16)
        # Each program reads all of x again: many rows of x call for many of the weight.
        block_n = 128 if block_m == SMALL_M and not batch_invariant else 64
        # 96 rows of the weight on each processor keep enough loads in flight; no processor is to be idle.
        split_k = 1 if batch_invariant else min(gpu.cdiv(max(96, block_n) * processors, n), max_split)
        config = MatmulConfig(
            block_m,
            block_n,
            block_k,
            split_k,
            transposed=True,
            num_warps=block_n // 16,
            num_stages=5 if block_m <= 32 else 4,
        )
        return _fitted(config, x_bytes, weight_bytes, shared_memory)
    choices = [
        MatmulConfig(block_m, 128, block_k, split_k, weight_bytes < x_bytes, num_warps=block_m // 16, num_stages=4)
        for block_m in (64, 128)
        for split_k in range(1, max_split + 1)
        if split_k == 1 or num_tiles(m, n, block_m, 128) <= MAX_TILES
    ]

    def cost(config: MatmulConfig) -> float:
        """Steps of the busiest processor, each weighted by the bytes it copies, and what adding partial sums takes."""
        step_bytes = (config.block_m * x_bytes + config.block_n * weight_bytes) * block_k
        adding = 2 * step_bytes + 8 * config.block_m * config.block_n if config.split_k > 1 else 0
        waves = gpu.cdiv(num_tiles(m, n, config.block_m, config.block_n) * config.split_k, processors)
        return waves * (gpu.cdiv(num_steps, config.split_k) * step_bytes + adding)

    return _fitted(min(choices, key=cost), x_bytes, weight_bytes, shared_memory)


def _fitted(config: MatmulConfig, x_bytes: int, weight_bytes: int, shared_memory: int) -> MatmulConfig:
    """With as many steps in flight as shared memory holds, beside 2 KiB of barriers."""
    step_bytes = (config.block_m * x_bytes + config.block_n * weight_bytes) * config.block_k
    return replace(config, num_stages=max(min(config.num_stages, (shared_memory - 2048) // step_bytes), 1))


def num_tiles(m: int, n: int, block_m: int, block_n: int) -> int:
    return gpu.cdiv(m, block_m) * gpu.cdiv(n, block_n)


def workspace(
    config: MatmulConfig, tiles: int, counters: torch.Tensor | None, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for partial sums, and zeroed counters; ``unused`` in place of both where K is not split."""
    if config.split_k == 1:
        return unused, unused
    shape = (config.split_k, tiles, config.block_m * config.block_n)
    partials = torch.empty(shape, dtype=torch.float32, device=unused.device)
    if counters is None:
        counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=unused.device)
    return partials, counters


def _launch_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    counters: torch.Tensor | None,
    batch_invariant: bool,
) -> torch.Tensor:
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if m == 0:
        return out
    config = choose_config(
        m,
        n,
        k,
        x_bytes=x.dtype.itemsize,
        weight_bytes=weight.dtype.itemsize,
        processors=gpu.num_processors(x.device),
        shared_memory=gpu.shared_memory(x.device),
        batch_invariant=batch_invariant,
    )
    block_k = config.block_k if block is None else min(block[1], config.block_k)
    tiles = num_tiles(m, n, config.block_m, config.block_n)
    partials, counters = workspace(config, tiles, counters, out)
    widen = weight.dtype.itemsize < x.dtype.itemsize
    by_descriptor = (
        m >= MIN_ROWS_FOR_DESCRIPTORS
        and not config.transposed
        and gpu.has_descriptors(x.device)
        and gpu.can_be_described(x)
        and gpu.can_be_described(weight)
    )
    gpu.launch(
        _matmul,
        (tiles, config.split_k),
        gpu.described(x, (config.block_m, block_k)) if by_descriptor else x,
        gpu.described(weight, (config.block_n, block_k))
        if by_descriptor
        else (weight.view(torch.uint8) if widen else weight),
        out,
        out if x_scale is None else x_scale,
        out if weight_scale is None else weight_scale,
        out if bias is None else bias,
        out if residual is None else residual,
        partials,
        counters,
        m,
        n,
        k,
        x.stride(0),
        0 if x_scale is None or x_scale.numel() == 1 else x_scale.stride(0),
        0 if weight_scale is None or weight_scale.numel() == 1 else weight_scale.stride(0),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        GROUP_N=1 if block is None else block[0],
        GROUP_K=0 if block is None else block[1],
        HAS_X_SCALE=x_scale is not None,
        HAS_WEIGHT_SCALE=weight_scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        WIDEN=widen,
        BY_DESCRIPTOR=by_descriptor,
        TRANSPOSED=config.transposed,
        SPLIT=config.split_k > 1,
        EVEN_K=k % block_k == 0,
        PREFETCH=gpu.prefetch_bytes(weight) if m <= SMALL_M else 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
    )
    return out


@jit
def widened(codes, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float8_e4m3fn codes, as uint8, in a wider type, exactly.

    Put into float16's fields, a code stands for its value · 2⁻⁸, subnormals included.
    """
    bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
    return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)


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
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A step's products times the scales of its group along K. column: the tile's first."""
    if GROUP_N % BLOCK_N == 0:  # one scale for all of the tile's columns
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
def steps_of_split(num_steps):  # type: ignore[no-untyped-def]
    """The first step along K of this program, and the first that is no longer its own."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    return num_steps * split // splits, num_steps * (split + 1) // splits


@jit
def is_last_of_split(  # type: ignore[no-untyped-def]
    total, partials, counters, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Lay down this program's partial sum of its tile; whether the others' lie there too.

    The barrier orders all threads' stores before the release; whoever comes last acquires them, and resets the counter.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    tl.store(_partial(partials, tile, split, BLOCK_M, BLOCK_N), total)
    tl.debug_barrier()
    is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == tl.num_programs(1) - 1
    tl.store(counters + tile, 0, mask=is_last)
    return is_last


@jit
def sum_of_split(partials, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The partial sums' sum, in their order. Read past the L1 cache, which other processors' stores do not reach."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(tl.num_programs(1)):
        total += tl.load(_partial(partials, tl.program_id(0), split, BLOCK_M, BLOCK_N), cache_modifier=".cg")
    return total


@jit
def _partial(partials, tile, split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    place = (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK_M * BLOCK_N)
    return partials + place + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


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
    m,
    n,
    x_scale_stride,
    weight_scale_stride,
    HAS_X_SCALE: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Scale a tile's sum per row and channel, add bias and residual, round, store."""
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


@jit(varying=("m",))
def _matmul(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    x_scale,
    weight_scale,
    bias,
    residual,
    partials,
    counters,
    m,
    n,
    k,
    x_stride,
    x_scale_stride,
    weight_scale_stride,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDEN: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (tile, split). GROUP_K: 0 for scales per row and channel, else scales per group along K."""
    row, column = tile_at(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the first ones, and are not stored.
    safe_rows, safe_columns = tl.where(rows < m, rows, 0), tl.where(columns < n, columns, 0)
    first, last = 0, tl.cdiv(k, BLOCK_K)
    if SPLIT:
        first, last = steps_of_split(last)
    if PREFETCH > 0:
        prefetch_rows(
            weight + safe_columns.to(tl.int64) * k + first * BLOCK_K,
            min(last * BLOCK_K, k) - first * BLOCK_K,
            PREFETCH,
        )
    wait_for_predecessor(EARLY)
    inner = tl.arange(0, BLOCK_K)
    if not BY_DESCRIPTOR:
        x_tile = x + safe_rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
        w_tile = weight + safe_columns.to(tl.int64)[:, None] * k + inner[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        if BY_DESCRIPTOR:
            x_values = x.load([row, step * BLOCK_K])
            w_values = weight.load([column, step * BLOCK_K])
        elif EVEN_K:
            x_values = tl.load(x_tile + step * BLOCK_K)
            w_values = tl.load(w_tile + step * BLOCK_K)
        else:
            inside = (step * BLOCK_K + inner < k)[None, :]
            x_values = tl.load(x_tile + step * BLOCK_K, mask=inside, other=0.0)
            w_values = tl.load(w_tile + step * BLOCK_K, mask=inside, other=0.0)
        partial = product(x_values, w_values, TRANSPOSED, WIDEN)
        if GROUP_K > 0:
            partial = scaled_by_group(
                partial,
                x_scale,
                weight_scale,
                safe_rows,
                column,
                safe_columns,
                step * BLOCK_K // GROUP_K,
                x_scale_stride,
                weight_scale_stride,
                GROUP_N,
                HAS_X_SCALE,
                TRANSPOSED,
                BLOCK_N,
            )
        total += partial
    if TRANSPOSED:
        total = tl.trans(total)
    is_last = True
    if SPLIT:
        is_last = is_last_of_split(total, partials, counters, BLOCK_M, BLOCK_N)
    if is_last:
        if SPLIT:
            total = sum_of_split(partials, BLOCK_M, BLOCK_N)
        store_tile(
            total,
            rows,
            columns,
            out,
            x_scale,
            weight_scale,
            bias,
            residual,
            m,
            n,
            x_scale_stride,
            weight_scale_stride,
            HAS_X_SCALE and GROUP_K == 0,
            HAS_WEIGHT_SCALE and GROUP_K == 0,
            HAS_BIAS,
            HAS_RESIDUAL,
        )
