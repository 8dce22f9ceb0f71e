"""Top-k, top-p and min-p, without a sort.

Floor: one more read and write of the probabilities of rows that ask for it; limited by memory. While probabilities are
written, the tokens above each of a few levels and their mass are counted. The highest level that all tokens to keep
must reach leaves few candidates, which are moved together; one program per row then finds the smallest probability
that is kept, by bisection over its bits. Only rows that ask for it take part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.row_parts import PART

LEVELS = 16
"""From the largest probability of a row down, the last above zero."""
CANDIDATES = 16384
"""Memory per row for tokens that top-k or top-p may keep; with more of them the row is worked on in place."""


class Truncation(NamedTuple):
    """Which tokens of each row are kept, by three rules; None for a rule that no row uses.

    top_k: [R] int64, 0 for all; top_p: [R] float32 in (0, 1]; min_p: [R] float32 in [0, 1)
    """

    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None

    def given(self) -> dict[str, bool]:
        """Constants of the kernels below."""
        top_k, top_p, min_p = (rule is not None for rule in self)
        return {"HAS_TOP_K": top_k, "HAS_TOP_P": top_p, "HAS_MIN_P": min_p}

    def tensors(self, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rules, ``unused`` in place of those that are not."""
        return tuple(unused if rule is None else rule for rule in self)


class Levels(NamedTuple):
    """What is counted of rows to truncate, while their probabilities are written.

    counts: [R, ⌈V / PART⌉, LEVELS] int32, tokens of a part at or above each level; masses: the same shape, float32,
        their sum; peak: [R] float32, a row's largest probability
    """

    counts: torch.Tensor
    masses: torch.Tensor
    peak: torch.Tensor

    @classmethod
    def of_rows(cls, rows: int, parts: int, device: torch.device) -> Levels:
        """Not counted yet."""
        counts = torch.empty(rows, parts, LEVELS, dtype=torch.int32, device=device)
        masses = torch.empty(rows, parts, LEVELS, dtype=torch.float32, device=device)
        return cls(counts, masses, torch.empty(rows, dtype=torch.float32, device=device))


def truncate_reference(probs: torch.Tensor, rules: Truncation) -> torch.Tensor:
    """Zeros for what is left out: of the mass of the top_k likeliest tokens, renormalised, top_p keeps the smallest set
    that reaches it; of those, min_p keeps what is at least that share of the likeliest.

    probs: [R, V] float32, rows sum to 1
    Returns [R, V] float32; rows need not sum to 1.
    """
    if rules.top_k is not None or rules.top_p is not None:
        probs = _truncate_ordered(probs, rules.top_k, rules.top_p)
    if rules.min_p is not None:
        probs = torch.where(probs < rules.min_p[:, None] * probs.amax(-1, keepdim=True), 0.0, probs)
    return probs


def _truncate_ordered(probs: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Keep the top_k likeliest tokens, and of their renormalised mass the smallest set that reaches top_p."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        vocab_size, k = probs.shape[-1], top_k[:, None]
        likeliest = torch.where(torch.arange(vocab_size, device=probs.device) < k, ordered, 0.0)
        # A row that keeps all tokens keeps its bits too, whatever its neighbours ask for.
        ordered = torch.where((k > 0) & (k < vocab_size), likeliest / likeliest.sum(-1, keepdim=True), ordered)
    if top_p is not None:
        mass_before = ordered.cumsum(-1) - ordered
        cut = mass_before >= top_p[:, None]
        cut[:, 0] = False
        ordered = torch.where(cut & (top_p[:, None] < 1.0), 0.0, ordered)
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def truncate_counted(probs: torch.Tensor, temperature: torch.Tensor, rules: Truncation, levels: Levels) -> None:
    """Truncate and renormalise, in place, rows that have a rule and a temperature above zero; by Triton only.

    probs: [R, V] float32, contiguous; temperature: [R] float32; levels: counted from probs
    """
    rows, vocab_size = probs.shape
    parts = levels.counts.shape[1]
    values = torch.empty(rows, CANDIDATES, dtype=torch.float32, device=probs.device)
    index = torch.empty(rows, CANDIDATES, dtype=torch.int32, device=probs.device)
    arguments = (temperature, *rules.tensors(temperature), *levels, values, index, probs, vocab_size, parts)
    constants = {
        **rules.given(),
        "PARTS": gpu.next_power_of_2(parts),
        "LEVELS": LEVELS,
        "CANDIDATES": CANDIDATES,
        "BLOCK": PART,
    }
    gpu.launch(_gather_candidates, (rows, parts), *arguments, **constants, CHUNK=1024)
    gpu.launch(_truncate_rows, (rows,), *arguments, num_warps=16, **constants)


@jit
def rules_of(  # type: ignore[no-untyped-def]
    temperature,
    top_k,
    top_p,
    min_p,
    row,
    vocab_size,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
):
    """top_k (0: off), top_p (1: off), min_p (0: off) of a row, and whether any is on; a greedy row has none."""
    k = tl.zeros((), tl.int32)
    p = tl.zeros((), tl.float32) + 1.0
    least = tl.zeros((), tl.float32)
    if HAS_TOP_K:
        given = tl.load(top_k + row)
        k = tl.where(given < vocab_size, given, 0).to(tl.int32)
    if HAS_TOP_P:
        p = tl.load(top_p + row)
    if HAS_MIN_P:
        least = tl.load(min_p + row)
    sampled = tl.load(temperature + row) != 0.0
    return k, p, least, sampled & ((k > 0) | (p < 1.0) | (least > 0.0))


@jit
def levels_below(peak, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Probabilities that lie ever further below the largest, ``peak``; powers of two apart, so exact."""
    i = tl.arange(0, LEVELS)
    ratio = ((127 - i - i * i // 8) << 23).to(tl.float32, bitcast=True)
    above_zero = tl.full((LEVELS,), 1, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(i == LEVELS - 1, above_zero, peak * ratio)


@jit
def _lowest_level(  # type: ignore[no-untyped-def]
    counts, masses, row, parts, peak, k, p, least, PARTS: tl.constexpr, LEVELS: tl.constexpr
):
    """The highest level that every token to keep reaches: its number, its probability, how many tokens reach it."""
    part, level = tl.arange(0, PARTS), tl.arange(0, LEVELS)
    at = (row * parts + part[:, None]) * LEVELS + level[None, :]
    inside = (part < parts)[:, None] & (level >= 0)[None, :]
    count = tl.sum(tl.load(counts + at, mask=inside, other=0), 0)
    mass = tl.sum(tl.load(masses + at, mask=inside, other=0.0), 0)
    thresholds = levels_below(peak, LEVELS)
    least_mass = tl.where(p < 1.0, p, float("inf"))
    # Top-k needs its tokens' whole mass, so there min-p may not leave any out yet.
    reached = tl.where(k > 0, count >= k, (mass >= least_mass) | (thresholds <= least * peak))
    lowest = tl.min(tl.where(reached, level, LEVELS - 1), 0)
    chosen = level == lowest
    return lowest, tl.sum(tl.where(chosen, thresholds, 0.0), 0), tl.sum(tl.where(chosen, count, 0), 0)


@jit(varying=("temperature", "top_k", "top_p", "min_p"))
def _gather_candidates(  # type: ignore[no-untyped-def]
    temperature,
    top_k,
    top_p,
    min_p,
    counts,
    masses,
    peak,
    values,
    index,
    out,
    vocab_size,
    parts,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Move tokens that may be kept together, in their order, and leave zeros. One program per row and part."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k, p, least, truncates = rules_of(
        temperature, top_k, top_p, min_p, row, vocab_size, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P
    )
    if truncates:
        lowest, threshold, num = _lowest_level(
            counts, masses, row, parts, tl.load(peak + row), k, p, least, PARTS, LEVELS
        )
        if num <= CANDIDATES:
            others = tl.arange(0, PARTS)
            at = counts + (row * parts + others) * LEVELS + lowest
            before = tl.sum(tl.load(at, mask=others < part, other=0), 0)
            end = tl.minimum(part * BLOCK + BLOCK, vocab_size)
            for start in range(part * BLOCK, end, CHUNK):
                offsets = start + tl.arange(0, CHUNK)
                probs = tl.load(out + row * vocab_size + offsets, mask=offsets < end, other=-1.0)
                chosen = (probs >= threshold).to(tl.int32)
                place = row * CANDIDATES + before + tl.cumsum(chosen, 0) - 1
                before += tl.sum(chosen, 0)
                tl.store(values + place, probs, mask=chosen > 0)
                tl.store(index + place, offsets, mask=chosen > 0)
                tl.store(out + row * vocab_size + offsets, tl.zeros((CHUNK,), tl.float32), mask=offsets < end)


@jit
def _sum_above(source, num, bits, MASS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of values, or their sum, whose bits are larger."""
    total = tl.zeros((BLOCK,), tl.float32 if MASS else tl.int32)
    for start in range(0, num, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        probs = tl.load(source + offsets, mask=offsets < num, other=-1.0)
        above = probs.to(tl.int32, bitcast=True) > bits
        total += tl.where(above, probs, 0.0) if MASS else above.to(tl.int32)
    return tl.sum(total, 0)


@jit
def _bisect(source, num, low, high, target, MASS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest bits in low … high above which there is less than target; above high there must be."""
    while low < high:
        middle = low + (high - low) // 2
        if _sum_above(source, num, middle, MASS, BLOCK) < target:
            high = middle
        else:
            low = middle + 1
    return high


@jit(varying=("temperature", "top_k", "top_p", "min_p"))
def _truncate_rows(  # type: ignore[no-untyped-def]
    temperature,
    top_k,
    top_p,
    min_p,
    counts,
    masses,
    peak,
    values,
    index,
    out,
    vocab_size,
    parts,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Find the smallest probability to keep, and how many of its equals; write what is kept. One program per row."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    k, p, least, truncates = rules_of(
        temperature, top_k, top_p, min_p, row, vocab_size, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P
    )
    if truncates:
        largest = tl.load(peak + row)
        _lowest, threshold, num = _lowest_level(counts, masses, row, parts, largest, k, p, least, PARTS, LEVELS)
        gathered = num <= CANDIDATES
        source = out + row * vocab_size
        low = tl.zeros((), tl.int32)
        if gathered:
            source = values + row * CANDIDATES
            low = threshold.to(tl.int32, bitcast=True)
        num = tl.where(gathered, num, vocab_size)
        high = largest.to(tl.int32, bitcast=True)

        # Kept are values above ``low``, and the first ``ties`` of those equal to it.
        ties = tl.full((), 0x7FFFFFFF, tl.int32)
        total = tl.zeros((), tl.float32) + 1.0
        if k > 0:
            low = _bisect(source, num, low, high, k, False, BLOCK)
            ties = k - _sum_above(source, num, low, False, BLOCK)
            equal = low.to(tl.float32, bitcast=True)
            total = _sum_above(source, num, low, True, BLOCK) + ties.to(tl.float32) * equal
        if p < 1.0:
            target = p * total
            cut = _bisect(source, num, low, high, target, True, BLOCK)
            missing = target - _sum_above(source, num, cut, True, BLOCK)
            # Not below the smallest normal float32: Triton takes such a constant for a float64.
            equal = tl.maximum(cut.to(tl.float32, bitcast=True), 1.2e-38)
            needed = tl.minimum(tl.ceil(tl.math.div_rn(missing, equal)), 1e9).to(tl.int32)
            needed = tl.maximum(needed, 1)
            ties = tl.where(cut > low, needed, tl.minimum(needed, ties))
            low = cut

        kept_mass = tl.zeros((), tl.float32)
        for writing in tl.static_range(2):
            ties_seen = tl.zeros((), tl.int32)
            for start in range(0, num, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                mask = offsets < num
                probs = tl.load(source + offsets, mask=mask, other=-1.0)
                bits = probs.to(tl.int32, bitcast=True)
                tie = (bits == low).to(tl.int32)
                rank = ties_seen + tl.cumsum(tie, 0) - tie
                keep = ((bits > low) | ((tie > 0) & (rank < ties))) & (probs >= least * largest)
                ties_seen += tl.sum(tie, 0)
                if writing:
                    kept = tl.where(keep, probs, 0.0)
                    place = offsets
                    if gathered:
                        place = tl.load(index + row * CANDIDATES + offsets, mask=mask, other=0)
                    whole = tl.zeros((BLOCK,), tl.float32) + kept_mass
                    tl.store(out + row * vocab_size + place, tl.math.div_rn(kept, whole), mask=mask)
                else:
                    kept_mass += tl.sum(tl.where(keep, probs, 0.0), 0)
