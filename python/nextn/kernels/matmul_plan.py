"""What the launch of a matrix product is made of, from its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nextn.kernels import gpu
from nextn.kernels.matmul_config import MAX_TILES, SMALL_M, MatmulConfig, choose_config, num_tiles


class MatmulPlan(NamedTuple):
    """Arguments of a kernel that multiplies by ``weight`` in the tiles of ``matmul_tile``.

    grid: programs, by tile and by share of K
    weight: as uint8 where its codes are widened
    weight_scale, partials, counters: tensors that are not read where there is no scale, or K is not split
    block_k: a step along K, in one group of scales
    options: warps, stages and constants
    """

    grid: tuple[int, int]
    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_stride: int
    partials: torch.Tensor
    counters: torch.Tensor
    config: MatmulConfig
    block_k: int
    options: dict[str, int]


def plan_matmul(
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    out: torch.Tensor,
    counters: torch.Tensor | None,
    *,
    x_dtype: torch.dtype,
    batch_invariant: bool,
) -> MatmulPlan:
    """How to multiply x [M, K] by weight [N, K], with the arguments of ``matmul``, into out [M, N]."""
    m, (n, k) = out.shape[0], weight.shape
    config = choose_config(
        m,
        n,
        k,
        x_bytes=x_dtype.itemsize,
        weight_bytes=weight.dtype.itemsize,
        has_groups=block is not None,
        processors=gpu.num_processors(out.device),
        shared_memory=gpu.shared_memory(out.device),
        batch_invariant=batch_invariant,
    )
    group_n, group_k = (1, 0) if block is None else block
    block_k = min(group_k or config.block_k, config.block_k)
    tiles = num_tiles(m, n, config.block_m, config.block_n)
    partials, counters = _workspace(config, tiles, counters, out)
    widen = weight.dtype.itemsize < x_dtype.itemsize
    return MatmulPlan(
        grid=(tiles, config.split_k),
        weight=weight.view(torch.uint8) if widen else weight,
        weight_scale=out if weight_scale is None else weight_scale,
        weight_scale_stride=0 if weight_scale is None or weight_scale.numel() == 1 else weight_scale.stride(0),
        partials=partials,
        counters=counters,
        config=config,
        block_k=block_k,
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "GROUP_N": group_n,
            "GROUP_K": group_k,
            "HAS_WEIGHT_SCALE": weight_scale is not None,
            "WIDEN": widen,
            "TRANSPOSED": config.transposed,
            "SPLIT": config.split_k > 1,
            "PREFETCH": gpu.prefetch_bytes(weight) if m <= SMALL_M else 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": block_k,
        },
    )


def _workspace(
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
