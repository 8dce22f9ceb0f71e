"""Products of FP8, bfloat16 or float16 weights with activations, accumulated in float32.

Floor: the weight's bytes at small M, limited by memory; 2 · M · N · K FLOPs at large M, limited by arithmetic.

One Triton kernel serves all of it. With few rows it computes the transposed product, so that the weight's rows fill
the tensor cores' tall side, and splits K over several programs, of which the last to finish adds the others' partial
sums in a fixed order. On cards without FP8 units, or for wide activations, codes are widened in registers.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, prefetch_rows, tl, wait_for_predecessor
from nextn.kernels.matmul_config import SMALL_M
from nextn.kernels.matmul_plan import plan_matmul
from nextn.kernels.matmul_tile import product, scaled_by_group, store_tile, tile_at
from nextn.kernels.split_k import steps_of_split

MIN_ROWS_FOR_DESCRIPTORS = 1024
"""From here on, copies by descriptor save more on the card than they cost on the host."""


def matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The product with a weight as it is stored: not quantized, with scales per channel, or per ``block``.

    Arguments as for the function below that serves it.
    Returns [M, N] in out_dtype.
    """
    if weight_scale is None:
        return wide_matmul(
            x, weight, bias, residual, out_dtype=out_dtype, counters=counters, batch_invariant=batch_invariant
        )
    multiply = w8a8_matmul if block is None else partial(block_fp8_matmul, block=block)
    return multiply(
        x,
        x_scale,
        weight,
        weight_scale,
        bias=bias,
        residual=residual,
        out_dtype=out_dtype,
        counters=counters,
        batch_invariant=batch_invariant,
    )


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
    """(x · x_scale) (weight · weight_scale)ᵀ + bias + residual, the scales applied to float32 sums.

    x: [M, K] float8_e4m3fn with x_scale [M, 1] float32, or one element, or [M, G], each for K / G columns, 32 or a
        larger power of two; or bfloat16 or float16 without a scale
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
    if x_scale is not None and (group := _columns_per_scale(x, x_scale)) is not None:
        out = (x.float() * x_scale.repeat_interleave(group, 1)) @ weight.float().t() * weight_scale.view(1, -1)
        return _finished(out, bias, residual, out_dtype)
    out = (x.float() @ weight.float().t()) * weight_scale.view(1, -1)
    return _finished(out if x_scale is None else out * x_scale, bias, residual, out_dtype)


def _columns_per_scale(x: torch.Tensor, x_scale: torch.Tensor) -> int | None:
    """None where a scale is that of a whole row, or of all."""
    return x.shape[1] // x_scale.shape[1] if x_scale.dim() == 2 and x_scale.shape[1] > 1 else None


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
    if block is not None or x_scale is None:
        groups = block
    else:
        columns = _columns_per_scale(x, x_scale)
        groups = None if columns is None else (1, columns)
    plan = plan_matmul(weight, weight_scale, groups, out, counters, x_dtype=x.dtype, batch_invariant=batch_invariant)
    by_descriptor = (
        m >= MIN_ROWS_FOR_DESCRIPTORS
        and not plan.config.transposed
        and gpu.has_descriptors(x.device)
        and gpu.can_be_described(x)
        and gpu.can_be_described(weight)
    )
    gpu.launch(
        _matmul,
        plan.grid,
        gpu.described(x, (plan.config.block_m, plan.block_k)) if by_descriptor else x,
        gpu.described(weight, (plan.config.block_n, plan.block_k)) if by_descriptor else plan.weight,
        out,
        out if x_scale is None else x_scale,
        plan.weight_scale,
        out if bias is None else bias,
        out if residual is None else residual,
        plan.partials,
        plan.counters,
        m,
        n,
        k,
        x.stride(0),
        0 if x_scale is None or x_scale.numel() == 1 else x_scale.stride(0),
        plan.weight_scale_stride,
        **plan.options,
        HAS_X_SCALE=x_scale is not None,
        WEIGHT_BY_GROUP=block is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BY_DESCRIPTOR=by_descriptor,
        EVEN_K=k % plan.block_k == 0,
    )
    return out


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
    WEIGHT_BY_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDEN: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (tile, split).

    GROUP_K: 0 for scales per row and channel, else x's scales are per group along K; WEIGHT_BY_GROUP: the weight's too
    """
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
                WEIGHT_BY_GROUP,
                TRANSPOSED,
                BLOCK_N,
            )
        total += partial
    store_tile(
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
        HAS_X_SCALE and GROUP_K == 0,
        HAS_WEIGHT_SCALE and not WEIGHT_BY_GROUP,
        HAS_BIAS,
        HAS_RESIDUAL,
        TRANSPOSED,
        SPLIT,
        BLOCK_M,
        BLOCK_N,
    )
