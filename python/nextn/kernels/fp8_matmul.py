"""Products of FP8 weights with FP8 or wider activations, accumulated in float32.

Floor: the weight's N · K bytes at small M, limited by memory; 2 · M · N · K FLOPs at large M, limited by arithmetic.

One Triton kernel serves all of it. With few rows it computes the transposed product, so that the weight's rows fill
the tensor cores' tall side, and splits K over several programs, of which the last to finish adds the others' partial
sums in a fixed order. On cards without FP8 units, or for wide activations, codes are widened in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl

BLOCK_K = 128
SMALL_M = 64
"""Up to this many rows, the product is limited by reading the weight."""
MAX_TILES = 1 << 14
"""Size of a counter buffer: most output tiles of a product whose K is split."""


@dataclass(frozen=True)
class MatmulConfig:
    """How a product is cut up.

    block_m, block_n: a program's output tile; split_k: programs that share a tile's K
    transposed: whether the tile is computed as [block_n, block_m]
    """

    block_m: int
    block_n: int
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
    Others as for ``w8a8_matmul``. Triton serves a block_k that is a power of two, from 16 on.
    Returns [M, N] in out_dtype.
    """
    block_n, block_k = block
    if gpu.suits(x, weight) and block_k >= 16 and block_k == gpu.next_power_of_2(block_k):
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


def _finished(
    out: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = out if bias is None else out + bias.float()
    return (out if residual is None else out + residual.float()).to(dtype)


def choose_config(m: int, n: int, k: int, processors: int, *, batch_invariant: bool) -> MatmulConfig:
    """processors: streaming multiprocessors of the card."""
    if batch_invariant:
        return MatmulConfig(64, 64, 1, transposed=True, num_warps=4, num_stages=4)
    if m <= SMALL_M:
        block_m = max(gpu.next_power_of_2(m), 16)
        tiles = gpu.cdiv(n, 64)
        # Two programs per processor keep its loads in flight; each should have a few steps of K to pipeline.
        split_k = min(gpu.cdiv(2 * processors, tiles), max(gpu.cdiv(k, BLOCK_K) // 4, 1), 8)
        return MatmulConfig(block_m, 64, split_k, transposed=True, num_warps=4, num_stages=5 if block_m <= 32 else 4)
    if gpu.cdiv(m, 128) * gpu.cdiv(n, 128) < processors:
        return MatmulConfig(64, 128, 1, transposed=False, num_warps=4, num_stages=4)
    return MatmulConfig(128, 128, 1, transposed=False, num_warps=8, num_stages=4)


def _launch_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
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
    config = choose_config(m, n, k, gpu.num_processors(x.device), batch_invariant=batch_invariant)
    num_tiles = gpu.cdiv(m, config.block_m) * gpu.cdiv(n, config.block_n)
    split_k = config.split_k if num_tiles <= MAX_TILES else 1
    partials = out
    if split_k > 1:
        shape = (split_k, num_tiles, config.block_m * config.block_n)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
        if counters is None:
            counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=x.device)
    is_wide = x.dtype.itemsize > 1
    block_k = BLOCK_K if block is None else min(block[1], BLOCK_K)
    gpu.launch(
        _matmul,
        (num_tiles, split_k),
        x,
        weight.view(torch.uint8) if is_wide else weight,
        out,
        weight_scale if x_scale is None else x_scale,
        weight_scale,
        out if bias is None else bias,
        out if residual is None else residual,
        partials,
        out if counters is None else counters,
        m,
        n,
        k,
        x.stride(0),
        0 if x_scale is None or x_scale.numel() == 1 else x_scale.stride(0),
        0 if weight_scale.numel() == 1 else weight_scale.stride(0),
        num_warps=config.num_warps,
        num_stages=config.num_stages - is_wide,
        GROUP_N=1 if block is None else block[0],
        GROUP_K=0 if block is None else block[1],
        HAS_X_SCALE=x_scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        WIDEN=is_wide,
        TRANSPOSED=config.transposed,
        SPLIT_K=split_k,
        EVEN_K=k % block_k == 0,
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

    The tensor cores add FP8 products with few bits, so their sum goes no further than one block of K.
    """
    if WIDEN:
        w = widened(w, x.dtype)
    if TRANSPOSED:
        return tl.dot(w, tl.trans(x), max_num_imprecise_acc=0)
    return tl.dot(x, tl.trans(w), max_num_imprecise_acc=0)


@jit
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile, split). GROUP_K: 0 for scales per row and channel, else scales per group along K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    # Eight tiles of rows share each tile of the weight while it is in the L2 cache.
    num_m, num_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = tile // (8 * num_n)
    height = min(num_m - band * 8, 8)
    row_tile = band * 8 + (tile % (8 * num_n)) % height
    column_tile = (tile % (8 * num_n)) // height
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the first ones, and are not stored.
    safe_rows, safe_columns = tl.where(rows < m, rows, 0), tl.where(columns < n, columns, 0)

    num_steps = tl.cdiv(k, BLOCK_K)
    first = num_steps * split // SPLIT_K
    last = num_steps * (split + 1) // SPLIT_K
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + safe_rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_tile = weight + safe_columns.to(tl.int64)[:, None] * k + inner[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        if EVEN_K:
            x_values = tl.load(x_tile + step * BLOCK_K)
            w_values = tl.load(w_tile + step * BLOCK_K)
        else:
            inside = (step * BLOCK_K + inner < k)[None, :]
            x_values = tl.load(x_tile + step * BLOCK_K, mask=inside, other=0.0)
            w_values = tl.load(w_tile + step * BLOCK_K, mask=inside, other=0.0)
        partial = product(x_values, w_values, TRANSPOSED, WIDEN)
        if GROUP_K > 0:
            group = step * BLOCK_K // GROUP_K
            scale_n = tl.load(weight_scale + (safe_columns // GROUP_N) * weight_scale_stride + group)
            partial *= scale_n[:, None] if TRANSPOSED else scale_n[None, :]
            if HAS_X_SCALE:
                scale_m = tl.load(x_scale + safe_rows * x_scale_stride + group)
                partial *= scale_m[None, :] if TRANSPOSED else scale_m[:, None]
        total += partial
    if TRANSPOSED:
        total = tl.trans(total)

    if SPLIT_K > 1:
        num_tiles = num_m * num_n
        cells = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        base = partials + tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
        stride = num_tiles.to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(base + split * stride + cells, total)
        tl.debug_barrier()
        num_done = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if num_done < SPLIT_K - 1:
            return
        tl.store(counters + tile, 0)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for other in range(SPLIT_K):
            total += tl.load(base + other * stride + cells, cache_modifier=".cg")

    if GROUP_K == 0:
        total *= tl.load(weight_scale + safe_columns * weight_scale_stride)[None, :]
        if HAS_X_SCALE:
            total *= tl.load(x_scale + safe_rows * x_scale_stride)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + safe_columns).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside_out = (rows < m)[:, None] & (columns < n)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + places, mask=inside_out, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside_out)
