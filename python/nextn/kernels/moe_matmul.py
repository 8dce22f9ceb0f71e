"""Products of rows with the matrices of their experts, with SwiGLU in the epilogue where asked for.

Floor: the matrices of the experts that are touched, read once, until an expert has some hundred rows; then FLOPs.
Few rows are computed transposed, so that the weight's rows fill the tensor cores' tall side. The tiles of a block of
rows are neighbours in the grid, so that an expert's matrix stays in the L2 cache for all its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nextn.kernels import gpu
from nextn.kernels.fp8_dequantize import dequantize, widened
from nextn.kernels.gpu import jit, prefetch_rows, tl, wait_for_predecessor
from nextn.kernels.matmul_tile import product
from nextn.kernels.moe_align import MoeAlignment

BLOCK_K_BYTES = 128


@dataclass(frozen=True)
class MoeConfig:
    """How the products are cut up.

    block_m, block_n: a program's tile of pairs and weight rows
    transposed: whether the tile is computed as [block_n, block_m]
    num_stages: most steps of BLOCK_K_BYTES of each row that are in shared memory at once
    """

    block_m: int
    block_n: int
    transposed: bool
    num_warps: int
    num_stages: int


def choose_config(
    num_tokens: int, top_k: int, num_routed: int, block: tuple[int, int] | None, *, batch_invariant: bool
) -> MoeConfig:
    """By how many rows an expert gets if all are equally liked."""
    if batch_invariant:
        return MoeConfig(64, 64, transposed=True, num_warps=4, num_stages=4)
    rows = num_tokens * top_k // num_routed
    if rows <= 8:
        return MoeConfig(16, 64, transposed=True, num_warps=4, num_stages=4)
    if rows <= 20:
        return MoeConfig(32, 64, transposed=True, num_warps=4, num_stages=4)
    if rows <= 160 or (block is not None and block[0] % 128):  # many scales per tile want registers
        return MoeConfig(64, 128, transposed=False, num_warps=4, num_stages=4)
    return MoeConfig(128, 128, transposed=False, num_warps=8, num_stages=4)


def expert_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    alignment: MoeAlignment,
    config: MoeConfig,
    *,
    swiglu: bool,
    out_dtype: torch.dtype,
    experts_are_old: bool = False,
) -> torch.Tensor:
    """x · weightᵀ for every pair with its expert; with ``swiglu``, silu(gate) · up of it, in float32.

    x: [T, K] or [num_pairs, K], float8_e4m3fn with x_scale [·, 1] or [·, ⌈K / block_k⌉] float32; or wider without one
    weight: [E, N, K] float8_e4m3fn, or as x without scales; with ``swiglu`` N = 2I, the gate's rows first
    weight_scale: [E, N, 1] float32, or [E, ⌈N / block_n⌉, ⌈K / block_k⌉] with ``block``; with ``swiglu`` gate and up
        have their own blocks, [E, 2⌈I / block_n⌉, ⌈K / block_k⌉]
    experts_are_old: whether something was launched since the alignment was made, so that few rows can ask for weights
        before x is there (see ``gpu.wait_for_predecessor``)
    Triton serves a block_k that is a power of two, from 32 on.
    Returns [num_pairs, N or I] in out_dtype.
    """
    num_experts, num_rows, k = weight.shape
    n = num_rows // 2 if swiglu else num_rows
    out = torch.empty(alignment.num_pairs, n, dtype=out_dtype, device=x.device)
    if not alignment.num_blocks:
        return out
    group_k = block[1] if block is not None else 0
    if not gpu.suits(x, weight) or (group_k and (group_k < 32 or group_k != gpu.next_power_of_2(group_k))):
        _expert_matmul_reference(x, x_scale, weight, weight_scale, block, alignment, out, swiglu=swiglu)
        return out
    is_widened = weight.itemsize < x.itemsize
    prefetch = gpu.prefetch_bytes(weight) if config.transposed else 0
    whole_row = gpu.cdiv(k * weight.itemsize, 32) * 32
    block_k = min(BLOCK_K_BYTES // x.itemsize, group_k or BLOCK_K_BYTES)
    step_bytes = (config.block_m * x.itemsize + config.block_n * weight.itemsize) * block_k
    grid = (gpu.cdiv(num_rows, config.block_n), alignment.num_blocks)
    # Where programs are too few to share processors, each keeps more loads in flight.
    are_few = config.transposed and grid[0] * grid[1] < 2 * gpu.num_processors(x.device)
    gpu.launch(
        _expert_matmul,
        grid,
        x,
        x if x_scale is None else x_scale,
        weight.view(torch.uint8) if is_widened else weight,
        x if weight_scale is None else weight_scale,
        out,
        alignment.experts,
        alignment.experts if alignment.pairs is None else alignment.pairs,
        alignment.num_pairs,
        alignment.experts.numel(),
        num_experts - 1,
        n,
        k,
        0 if x_scale is None else x_scale.stride(0),
        0 if weight_scale is None else weight_scale.shape[1],
        0 if weight_scale is None else weight_scale.shape[2],
        num_warps=config.num_warps,
        num_stages=min(
            2 * config.num_stages if are_few else config.num_stages, (gpu.shared_memory(x.device) - 2048) // step_bytes
        ),
        SWIGLU=swiglu,
        IS_ONE_TOKEN=alignment.pairs is None,
        PAIRS_PER_ROW=alignment.num_pairs // x.shape[0],
        GROUP_N=1 if block is None else block[0],
        GROUP_K=group_k,
        HAS_X_SCALE=x_scale is not None,
        HAS_WEIGHT_SCALE=weight_scale is not None,
        WIDEN=is_widened,
        TRANSPOSED=config.transposed,
        EVEN_K=k % block_k == 0,
        PREFETCH=prefetch if experts_are_old else 0,
        # A single token's routed experts may be unknown until the launch before ends; its shared one is not.
        PREFETCH_SHARED=whole_row if prefetch and alignment.pairs is None and not experts_are_old else 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
    )
    return out


def _expert_matmul_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    alignment: MoeAlignment,
    out: torch.Tensor,
    *,
    swiglu: bool,
) -> None:
    wide = x.float()
    if x_scale is not None:
        size = x.shape[1] if block is None else block[1]
        wide = wide * x_scale.repeat_interleave(size, 1)[:, : x.shape[1]]
    pairs_per_row = alignment.num_pairs // x.shape[0]
    for expert, pairs in _rows_of_experts(alignment, weight.shape[0]):
        matrices = weight[expert].chunk(2 if swiglu else 1)
        if weight_scale is None:
            products = [wide[pairs // pairs_per_row] @ matrix.float().t() for matrix in matrices]
        else:
            scales = weight_scale[expert].chunk(len(matrices))
            expanded = [dequantize(matrix, scale, block) for matrix, scale in zip(matrices, scales, strict=True)]
            products = [wide[pairs // pairs_per_row] @ matrix.t() for matrix in expanded]
        out[pairs] = (F.silu(products[0]) * products[1] if swiglu else products[0]).to(out.dtype)


def _rows_of_experts(alignment: MoeAlignment, num_experts: int) -> list[tuple[int, torch.Tensor]]:
    """(expert, its pairs), block by block."""
    experts = alignment.experts.tolist()
    if alignment.pairs is None:
        experts += [num_experts - 1] * (alignment.num_blocks - len(experts))
        return [(expert, torch.tensor([pair])) for pair, expert in enumerate(experts)]
    pairs = zip(experts, alignment.pairs, strict=True)
    return [(expert, rows[rows < alignment.num_pairs].long()) for expert, rows in pairs if expert >= 0]


@jit(varying=("num_pairs", "num_listed"))
def _expert_matmul(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    experts,
    pairs,
    num_pairs,
    num_listed,
    last_expert,
    n,
    k,
    x_scale_stride,
    num_scale_rows,
    num_scale_columns,
    SWIGLU: tl.constexpr,
    IS_ONE_TOKEN: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    WIDEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PREFETCH_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (tile of weight rows, block of pairs). GROUP_K: 0 for scales per row and channel.

    With SWIGLU a tile's rows are those of the gate and of up by turns, so that a thread holds both.
    PREFETCH: bytes of each row that are asked for before waiting; PREFETCH_SHARED: of the shared expert's alone
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    inner_m, inner_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # Columns beyond the end are the first ones, and are not stored.
    halves: tl.constexpr = 2 if SWIGLU else 1
    width: tl.constexpr = BLOCK_N // halves
    half = inner_n % halves
    column = tile * width + inner_n // halves
    column = tl.where(column < n, column, 0)
    weight_row = column + half * n
    num_rows = n * halves
    scale_row = column // GROUP_N + half * (num_scale_rows // halves)

    # What is read before waiting is read past the L1 cache, which may be emptied for this kernel no earlier than then.
    CACHE: tl.constexpr = ".cg" if PREFETCH > 0 else ""
    if PREFETCH == 0:
        if PREFETCH_SHARED > 0:  # noqa: SIM102 - known when the kernel is compiled
            if block >= num_listed:
                rows = weight + (last_expert * num_rows + weight_row).to(tl.int64) * k
                prefetch_rows(rows, k, PREFETCH_SHARED)
        wait_for_predecessor(EARLY)
    if IS_ONE_TOKEN:
        expert = tl.load(experts + block, mask=block < num_listed, other=last_expert, cache_modifier=CACHE).to(tl.int64)
        pair = tl.where(inner_m == 0, block, num_pairs)
    else:
        expert = tl.load(experts + block, cache_modifier=CACHE).to(tl.int64)
        pair = tl.load(pairs + block * BLOCK_M + inner_m, cache_modifier=CACHE)
    if PREFETCH > 0:
        if block * tl.num_programs(0) + tile < 1024:  # later ones do not start early
            rows = weight + (tl.maximum(expert, 0) * num_rows + weight_row) * k
            prefetch_rows(rows, k, PREFETCH)
        wait_for_predecessor(EARLY)
    if expert < 0:
        return
    # Rows beyond the end are zeros, and are not stored.
    is_pair = (pair < num_pairs)[:, None]
    row = (tl.where(pair < num_pairs, pair, 0) // PAIRS_PER_ROW).to(tl.int64)

    inner_k = tl.arange(0, BLOCK_K)
    x_tile = x + row[:, None] * k + inner_k[None, :]
    w_tile = weight + (expert * num_rows + weight_row)[:, None] * k + inner_k[None, :]
    x_scales = x_scale + row * x_scale_stride
    w_scales = weight_scale + (expert * num_scale_rows + scale_row) * num_scale_columns
    # Where the tile's rows, or those of each half, have one scale, it is read as such.
    tile_scales = weight_scale + (expert * num_scale_rows + tile * width // GROUP_N) * num_scale_columns
    other_scales = tile_scales + num_scale_rows // halves * num_scale_columns
    total = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        if EVEN_K:
            x_values = tl.load(x_tile + step * BLOCK_K, mask=is_pair, other=0.0)
            w_values = tl.load(w_tile + step * BLOCK_K)
        else:
            inside = (step * BLOCK_K + inner_k < k)[None, :]
            x_values = tl.load(x_tile + step * BLOCK_K, mask=is_pair & inside, other=0.0)
            w_values = tl.load(w_tile + step * BLOCK_K, mask=inside, other=0.0)
        if GROUP_K > 0:
            # Asked for before the product, which hides their latency.
            group = step * BLOCK_K // GROUP_K
            if GROUP_N % width != 0:
                scale_n = tl.load(w_scales + group)
            elif SWIGLU:
                scale_n = tl.where(half == 0, tl.load(tile_scales + group), tl.load(other_scales + group))
            else:
                scale_n = tl.load(tile_scales + group) + tl.zeros((BLOCK_N,), tl.float32)
            if HAS_X_SCALE:
                scale_m = tl.load(x_scales + group)
            partial = product(x_values, w_values, TRANSPOSED, WIDEN)
            partial *= scale_n[:, None] if TRANSPOSED else scale_n[None, :]
            if HAS_X_SCALE:
                partial *= scale_m[None, :] if TRANSPOSED else scale_m[:, None]
            total += partial
        elif HAS_X_SCALE:
            total += product(x_values, w_values, TRANSPOSED, WIDEN)
        else:
            if WIDEN:
                w_values = widened(w_values, x_values.dtype)
            if TRANSPOSED:
                total = tl.dot(w_values, tl.trans(x_values), total)
            else:
                total = tl.dot(x_values, tl.trans(w_values), total)
    if TRANSPOSED:
        total = tl.trans(total)

    if GROUP_K == 0:
        if HAS_WEIGHT_SCALE:
            total *= tl.load(w_scales)[None, :]
        if HAS_X_SCALE:
            total *= tl.load(x_scales)[:, None]
    if SWIGLU:
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N // 2, 2)))
        total = gate * tl.sigmoid(gate) * up
    column = tile * width + tl.arange(0, width)
    places = pair.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_pair & (column < n)[None, :])
