"""Rows of logits, cut into parts: the largest of each, and what a softmax sums.

Floor: one read of the logits; limited by memory. A part is one program's, whatever the batch is, so that a row's sums
do not depend on its neighbours.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor

PART = 4096
"""Tokens of a row that one program works on."""
MIN_TEMPERATURE = 1e-30
"""Below this, logits divided by the temperature could be infinite, and their softmax undefined."""


def largest_of_parts(
    logits: torch.Tensor, temperature: torch.Tensor | None = None, sums: torch.Tensor | None = None
) -> torch.Tensor:
    """The first largest logit of each part, packed with its index; by Triton only.

    logits: [R, V] float32 or bfloat16, contiguous
    temperature: [R] float32 and sums: [R, ⌈V / PART⌉] float32, both or neither: where to put the parts' sums of
        e^((logit - the part's largest) / temperature)
    Returns [R, ⌈V / PART⌉] int64.
    """
    rows, vocab_size = logits.shape
    parts = gpu.cdiv(vocab_size, PART)
    best = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    if rows:
        gpu.launch(
            _parts_of_rows,
            (rows, parts),
            logits,
            best if temperature is None else temperature,
            best,
            best if sums is None else sums,
            vocab_size,
            parts,
            WITH_SUMS=sums is not None,
            BLOCK=PART,
        )
    return best


@jit
def packed(x, index):  # type: ignore[no-untyped-def]
    """An int64 that grows with x, and falls with the index among equals. NaN counts as the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def value_of(packed):  # type: ignore[no-untyped-def]
    """The float32 in it."""
    key = (packed >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def index_of(packed):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@jit
def divisor_of(temperature):  # type: ignore[no-untyped-def]
    return tl.where(temperature == 0.0, 1.0, tl.maximum(temperature, 1e-30))


@jit
def exponential(x, largest, divisor):  # type: ignore[no-untyped-def]
    """e^((x - largest) / divisor); 0 for x = -∞, also where nothing is larger."""
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp(tl.math.div_rn(x - finite, tl.zeros_like(x) + divisor))


@jit
def packed_of_row(best, row, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What largest_of_parts found in a row: [PARTS], beyond the row's parts less than any."""
    index = tl.arange(0, PARTS)
    return tl.load(best + row * parts + index, mask=index < parts, other=-0x7FFFFFFFFFFFFFFF)


@jit(varying=("temperature",))
def _parts_of_rows(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    best,
    sums,
    vocab_size,
    parts,
    WITH_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per row and part."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < vocab_size
    x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    first = tl.max(tl.where(mask, packed(x, offsets), -0x7FFFFFFFFFFFFFFF), 0)
    tl.store(best + row * parts + part, first)
    if WITH_SUMS:
        divisor = divisor_of(tl.load(temperature + row))
        tl.store(sums + row * parts + part, tl.sum(exponential(x, value_of(first), divisor), 0))
