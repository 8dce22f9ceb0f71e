"""Counter-based random numbers: a pure function of (seed, position, stream), so batching cannot change them.

The mixer is SplitMix64's finalizer (Steele, Lea & Flood, 2014, "Fast splittable pseudorandom number generators"),
applied once per key word. Cost: a dozen integer operations per number; limited by launches. Triton kernels that need
a number compute it themselves with ``uniform``.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor

DRAFT_STREAM = 0
"""Draws the draft token of a position."""
ACCEPT_STREAM = 1
"""Decides whether the draft of a position is accepted."""
FINAL_STREAM = 2
"""Draws the token of a position from the residual, or from the target where there was no draft."""

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def random_uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), one per (seed, position).

    seeds: [n] int64
    positions: [n] or [n, k] int64
    stream: which of the independent numbers of that key
    Returns float64 of positions' shape, with 53 random bits.
    """
    if gpu.suits(seeds, positions):
        return _launch_uniform(seeds, positions, stream)
    state = _mix(seeds + torch.full_like(seeds, stream + 1) * _GOLDEN_GAMMA)
    if positions.dim() == 2:
        state = state[:, None]
    bits = _mix(state + (positions + 1) * _GOLDEN_GAMMA)
    return _logical_shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _logical_shift_right(z, 30)) * _MIX_1
    z = (z ^ _logical_shift_right(z, 27)) * _MIX_2
    return z ^ _logical_shift_right(z, 31)


def _logical_shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 >> is arithmetic; clear the sign's copies."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _launch_uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int) -> torch.Tensor:
    out = torch.empty(positions.shape, dtype=torch.float64, device=positions.device)
    if out.numel():
        width = positions.shape[1] if positions.dim() == 2 else 1
        gpu.launch(
            _uniform_numbers,
            (gpu.cdiv(out.numel(), 128),),
            seeds.contiguous(),
            positions.contiguous(),
            out,
            out.numel(),
            width,
            STREAM=stream,
            BLOCK=128,
        )
    return out


@jit
def uniform(seed, position, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of random_uniform. seed, position: int64. Returns float64."""
    state = _mixed(seed.to(tl.uint64, bitcast=True) + tl.full((), STREAM + 1, tl.uint64) * 0x9E3779B97F4A7C15)
    bits = _mixed(state + (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    return (bits >> 11).to(tl.int64, bitcast=True).to(tl.float64) * 1.1102230246251565e-16  # 2⁻⁵³


@jit
def _mixed(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit(varying=("seeds", "positions", "n", "width"))
def _uniform_numbers(seeds, positions, out, n, width, STREAM: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_predecessor(EARLY)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    seed = tl.load(seeds + offsets // width, mask=mask, other=0)
    position = tl.load(positions + offsets, mask=mask, other=0)
    tl.store(out + offsets, uniform(seed, position, STREAM), mask=mask)
