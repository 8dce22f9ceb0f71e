"""Sharing a tile's K among programs, of which the last to finish adds the others' partial sums in a fixed order.

Costs a write and a read of each partial sum in float32, which stay in the L2 cache.
"""

from __future__ import annotations

from nextn.kernels.gpu import jit, tl


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
