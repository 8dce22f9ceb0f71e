"""The front of the NextN layer: eh_proj(concat[enorm(embed(t)), hnorm(h)]).

Floor: the projection's 2H² elements, limited by memory, at few tokens; 4 · T · H² FLOPs at many.

In Triton the concatenation exists nowhere: a launch finds the norms' factors, two numbers per token, and the product
reads each tile of its input from the embedding's rows or from the hidden states, and norms it on the way.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu, native
from nextn.kernels.fp8_quantize import warps_for_row
from nextn.kernels.gpu import jit, prefetch_rows, tl, wait_for_predecessor
from nextn.kernels.matmul import matmul
from nextn.kernels.matmul_config import SMALL_M
from nextn.kernels.matmul_plan import plan_matmul
from nextn.kernels.matmul_tile import product, scaled_by_group, store_tile, tile_at
from nextn.kernels.rms_norm import rms_norm
from nextn.kernels.split_k import steps_of_split


def nextn_input(
    input_ids: torch.Tensor,
    embedding: torch.Tensor,
    hidden_states: torch.Tensor,
    enorm: torch.Tensor,
    hnorm: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Normed embeddings beside normed hidden states, the embedding's half first.

    input_ids: [T] int64, each in [0, V); embedding: [V, H]; hidden_states: [T, H]; enorm, hnorm: [H]
    Returns [T, 2H] in hidden_states' dtype.
    """
    if native.cpu is not None and native.suits(hidden_states) and native.suits(embedding):
        num_tokens, size = hidden_states.shape
        out = hidden_states.new_empty(num_tokens, 2 * size)
        native.cpu.nextn_input(
            input_ids.data_ptr(),
            embedding.data_ptr(),
            hidden_states.data_ptr(),
            enorm.data_ptr(),
            hnorm.data_ptr(),
            num_tokens,
            size,
            eps,
            out.data_ptr(),
        )
        return out
    embedded = embedding.index_select(0, input_ids)
    return torch.cat([rms_norm(embedded, enorm, eps), rms_norm(hidden_states, hnorm, eps)], -1)


def nextn_projection(
    input_ids: torch.Tensor,
    embedding: torch.Tensor,
    hidden_states: torch.Tensor,
    enorm: torch.Tensor,
    hnorm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    counters: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """concat[enorm(embed(t)), hnorm(h)] weightᵀ, the embedding's half first.

    input_ids: [T] int64, each in [0, V); embedding: [V, H]; hidden_states: [T, H]; enorm, hnorm: [H]
    weight: [N, 2H] in hidden_states' dtype; or float8_e4m3fn with weight_scale [N, 1] or one element, or with ``block``
        [⌈N / block_n⌉, ⌈2H / block_k⌉]. Its input is not quantized: it is rounded to hidden_states' dtype once normed.
    out_dtype: hidden_states' where not given
    counters, batch_invariant: as for ``w8a8_matmul``
    Returns [T, N] in out_dtype.
    """
    dtype = out_dtype or hidden_states.dtype
    is_served = _is_served(embedding, hidden_states, weight, block, batch_invariant=batch_invariant)
    if is_served and gpu.suits(input_ids, embedding, hidden_states, weight):
        return _launch_projection(
            input_ids,
            embedding,
            hidden_states,
            enorm,
            hnorm,
            eps,
            weight,
            weight_scale,
            block,
            dtype,
            counters,
            batch_invariant,
        )
    x = nextn_input(input_ids, embedding, hidden_states, enorm, hnorm, eps)
    return matmul(
        x,
        None,
        weight,
        weight_scale,
        block,
        out_dtype=dtype,
        counters=counters,
        batch_invariant=batch_invariant,
    )


def _is_served(
    embedding: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    block: tuple[int, int] | None,
    *,
    batch_invariant: bool,
) -> bool:
    """By the fused kernel.

    Activations are 16 bits wide, and no block of scales reaches from one half into the other. To norm a tile again for
    each tile of the weight beside widening the latter takes more registers than many tokens leave.
    """
    if embedding.dtype != hidden_states.dtype or hidden_states.dtype.itemsize != 2:
        return False
    if weight.dtype.itemsize == 1 and hidden_states.shape[0] > SMALL_M and not batch_invariant:
        return False
    if block is None:
        return True
    return block[1] >= 16 and block[1] == gpu.next_power_of_2(block[1]) and hidden_states.shape[1] % block[1] == 0


def _launch_projection(
    input_ids: torch.Tensor,
    embedding: torch.Tensor,
    hidden_states: torch.Tensor,
    enorm: torch.Tensor,
    hnorm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    out_dtype: torch.dtype,
    counters: torch.Tensor | None,
    batch_invariant: bool,
) -> torch.Tensor:
    (num_tokens, size), n = hidden_states.shape, weight.shape[0]
    device = hidden_states.device
    out = torch.empty(num_tokens, n, dtype=out_dtype, device=device)
    if num_tokens == 0:
        return out
    factors = torch.empty(num_tokens, 2, dtype=torch.float32, device=device)
    gpu.launch(
        _norm_factors,
        (num_tokens, 2),
        input_ids,
        embedding,
        hidden_states,
        factors,
        size,
        hidden_states.stride(0),
        eps,
        num_warps=warps_for_row(size),
        BLOCK=gpu.next_power_of_2(size),
    )
    plan = plan_matmul(
        weight, weight_scale, block, out, counters, x_dtype=hidden_states.dtype, batch_invariant=batch_invariant
    )
    gpu.launch(
        _project,
        plan.grid,
        input_ids,
        embedding,
        hidden_states,
        factors,
        enorm,
        hnorm,
        plan.weight,
        out,
        plan.weight_scale,
        plan.partials,
        plan.counters,
        num_tokens,
        n,
        size,
        hidden_states.stride(0),
        plan.weight_scale_stride,
        **plan.options,
        EVEN_K=size % plan.block_k == 0,
    )
    return out


@jit(varying=("input_ids",))
def _norm_factors(  # type: ignore[no-untyped-def]
    input_ids, embedding, hidden_states, factors, size, hidden_stride, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Program (token, half). What RMSNorm multiplies a row by, before its weight."""
    wait_for_predecessor(EARLY)
    token, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    if half == 0:
        values = tl.load(embedding + tl.load(input_ids + token) * size + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(hidden_states + token * hidden_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(factors + token * 2 + half, 1.0 / tl.sqrt_rn(tl.sum(values * values, 0) / size + eps))


@jit(varying=("input_ids", "num_tokens"))
def _project(  # type: ignore[no-untyped-def]
    input_ids,
    embedding,
    hidden_states,
    factors,
    enorm,
    hnorm,
    weight,
    out,
    weight_scale,
    partials,
    counters,
    num_tokens,
    n,
    size,
    hidden_stride,
    weight_scale_stride,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    WIDEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (tile, split). A step along K lies in one half; each half is stepped through from its own start."""
    row, column = tile_at(tl.program_id(0), num_tokens, n, BLOCK_M, BLOCK_N)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the first ones, and are not stored.
    safe_rows, safe_columns = tl.where(rows < num_tokens, rows, 0), tl.where(columns < n, columns, 0)
    steps_of_half = tl.cdiv(size, BLOCK_K)
    first, last = 0, 2 * steps_of_half
    if SPLIT:
        first, last = steps_of_split(last)
    if PREFETCH > 0:
        # A step past the middle begins at the second half's own start, here as far back as prefetching wants.
        begin = first * BLOCK_K if first < steps_of_half else size + (first - steps_of_half) * BLOCK_K
        begin = begin // 16 * 16
        prefetch_rows(weight + safe_columns.to(tl.int64) * (2 * size) + begin, 2 * size - begin, PREFETCH)
    wait_for_predecessor(EARLY)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
    for half in tl.static_range(2):
        if half == 0:
            x_rows, norm = embedding + tl.load(input_ids + safe_rows) * size, enorm
        else:
            x_rows, norm = hidden_states + safe_rows.to(tl.int64) * hidden_stride, hnorm
        x_tile = x_rows[:, None] + inner[None, :]
        w_tile = weight + safe_columns.to(tl.int64)[:, None] * (2 * size) + (half * size + inner)[None, :]
        factor = tl.load(factors + safe_rows * 2 + half)[:, None]
        for step in range(max(first - half * steps_of_half, 0), min(last - half * steps_of_half, steps_of_half)):
            if EVEN_K:
                x_values = tl.load(x_tile + step * BLOCK_K)
                w_values = tl.load(w_tile + step * BLOCK_K)
                norm_values = tl.load(norm + step * BLOCK_K + inner)
            else:
                inside = step * BLOCK_K + inner < size
                x_values = tl.load(x_tile + step * BLOCK_K, mask=inside[None, :], other=0.0)
                w_values = tl.load(w_tile + step * BLOCK_K, mask=inside[None, :], other=0.0)
                norm_values = tl.load(norm + step * BLOCK_K + inner, mask=inside, other=0.0)
            normed = x_values.to(tl.float32) * factor * norm_values.to(tl.float32)[None, :]
            partial = product(normed.to(x_values.dtype), w_values, TRANSPOSED, WIDEN)
            if GROUP_K > 0:
                partial = scaled_by_group(
                    partial,
                    factors,
                    weight_scale,
                    safe_rows,
                    column,
                    safe_columns,
                    (half * size + step * BLOCK_K) // GROUP_K,
                    0,
                    weight_scale_stride,
                    GROUP_N,
                    False,
                    True,
                    TRANSPOSED,
                    BLOCK_N,
                )
            total += partial
    store_tile(
        total,
        rows,
        columns,
        out,
        factors,
        weight_scale,
        out,
        out,
        partials,
        counters,
        num_tokens,
        n,
        0,
        weight_scale_stride,
        False,
        HAS_WEIGHT_SCALE and GROUP_K == 0,
        False,
        False,
        TRANSPOSED,
        SPLIT,
        BLOCK_M,
        BLOCK_N,
    )
