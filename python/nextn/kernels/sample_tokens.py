"""Drawing a token from each row of probabilities.

Floor: one read of the probabilities; limited by memory, at few rows by launches. The mass of each part of a row is
summed; the part that holds the token is read again.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.row_parts import PART


def sample_tokens(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    probs: [R, V] float32, non-negative, not all zero in a row; they need not sum to 1
    uniform: [R] float64 in [0, 1)
    Returns [R] int64; a token of zero probability is never drawn.
    """
    if gpu.suits(probs, uniform):
        return _launch_draw(probs.contiguous(), uniform)
    cumulative = probs.to(torch.float64).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _launch_draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    rows, vocab_size = probs.shape
    parts = gpu.cdiv(vocab_size, PART)
    masses = torch.empty(rows, parts, dtype=torch.float64, device=probs.device)
    out = torch.empty(rows, dtype=torch.int64, device=probs.device)
    if rows:
        gpu.launch(_mass_of_parts, (rows, parts), probs, masses, vocab_size, parts, BLOCK=PART)
        gpu.launch(
            _draw_rows,
            (rows,),
            probs,
            uniform,
            masses,
            out,
            vocab_size,
            parts,
            num_warps=8,
            PARTS=gpu.next_power_of_2(parts),
            BLOCK=PART,
        )
    return out


@jit
def _mass_of_parts(probs, masses, vocab_size, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row and part."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(probs + row * vocab_size + offsets, mask=offsets < vocab_size, other=0.0)
    tl.store(masses + row * parts + part, tl.sum(p.to(tl.float64), 0))


@jit
def part_to_draw_from(masses, uniform, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which part holds the token, and how much of its mass comes before it. masses: [PARTS] float64, zero beyond."""
    index = tl.arange(0, PARTS)
    cumulative = tl.cumsum(masses, 0)
    threshold = uniform * tl.sum(tl.where(index == PARTS - 1, cumulative, 0.0), 0)
    # Sums of a scan need not grow by rounding; a part without mass is never meant.
    last = tl.max(tl.where(masses > 0.0, index, 0), 0)
    chosen = tl.min(tl.where((masses > 0.0) & (cumulative > threshold), index, last), 0)
    return chosen, threshold - tl.sum(tl.where(index == chosen - 1, cumulative, 0.0), 0)


@jit
def token_to_draw(mass, offsets, threshold, vocab_size):  # type: ignore[no-untyped-def]
    """The first token of a part whose cumulative mass exceeds the threshold. mass: [BLOCK] float64."""
    possible = mass > 0.0
    last = tl.maximum(tl.max(tl.where(possible, offsets, 0), 0), 0)
    token = tl.min(tl.where(possible & (tl.cumsum(mass, 0) > threshold), offsets, last), 0)
    return tl.minimum(token, vocab_size - 1)


@jit(varying=("uniform",))
def _draw_rows(  # type: ignore[no-untyped-def]
    probs, uniform, masses, out, vocab_size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """One program per row."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PARTS)
    mass = tl.load(masses + row * parts + index, mask=index < parts, other=0.0)
    part, threshold = part_to_draw_from(mass, tl.load(uniform + row), PARTS)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(probs + row * vocab_size + offsets, mask=offsets < vocab_size, other=0.0)
    tl.store(out + row, token_to_draw(p.to(tl.float64), offsets, threshold, vocab_size).to(tl.int64))
