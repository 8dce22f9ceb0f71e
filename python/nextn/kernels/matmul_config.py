"""How a product of an activation and a weight is cut up among a card's processors, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from nextn.kernels.gpu import cdiv, next_power_of_2

SMALL_M = 64
"""Up to this many rows, the product is limited by reading the weight."""
MAX_TILES = 1 << 14
"""Most output tiles of a product whose K is split."""
MAX_SPLIT_K = 8


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


@lru_cache(maxsize=1 << 14)
def choose_config(
    m: int,
    n: int,
    k: int,
    *,
    x_bytes: int,
    weight_bytes: int,
    has_groups: bool,
    processors: int,
    shared_memory: int,
    batch_invariant: bool = False,
) -> MatmulConfig:
    """How to cut up [m, k] · [n, k]ᵀ, from the shapes alone.

    x_bytes, weight_bytes: of an element; has_groups: whether scales are per group along K
    processors: streaming multiprocessors of the card; shared_memory: bytes a program can have of it
    """
    few = batch_invariant or m <= SMALL_M
    block_k = 128 if weight_bytes == 1 and (x_bytes == 1 or few) else 64
    num_steps = cdiv(k, block_k)
    max_split = min(max(num_steps // 4, 1), MAX_SPLIT_K)
    if few:
        block_m = SMALL_M if batch_invariant else max(next_power_of_2(m), 16)
        # Each program reads all of x again: many rows of x call for many of the weight.
        block_n = 128 if block_m == SMALL_M and not batch_invariant else 64
        # 96 rows of the weight on each processor keep enough loads in flight; no processor is to be idle.
        split_k = 1 if batch_invariant else min(cdiv(max(96, block_n) * processors, n), max_split)
        if has_groups and block_n == 128:
            # A group's sum beside the total takes so many registers that a processor holds one program: no second wave.
            split_k = min(split_k, max(processors // num_tiles(m, n, block_m, block_n), 1))
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
        waves = cdiv(num_tiles(m, n, config.block_m, config.block_n) * config.split_k, processors)
        return waves * (cdiv(num_steps, config.split_k) * step_bytes + adding)

    return _fitted(min(choices, key=cost), x_bytes, weight_bytes, shared_memory)


def _fitted(config: MatmulConfig, x_bytes: int, weight_bytes: int, shared_memory: int) -> MatmulConfig:
    """With as many steps in flight as shared memory holds, beside 2 KiB of barriers."""
    step_bytes = (config.block_m * x_bytes + config.block_n * weight_bytes) * config.block_k
    return replace(config, num_stages=max(min(config.num_stages, (shared_memory - 2048) // step_bytes), 1))


def num_tiles(m: int, n: int, block_m: int, block_n: int) -> int:
    return cdiv(m, block_m) * cdiv(n, block_n)
