"""From logits to a distribution to a token.

Floor: one read of the logits [R, V] and one write of the probabilities, in float32; limited by memory, at few rows by
launches. A row is cut into parts of PART tokens, one program each, whatever the batch is, so that a row's sums do not
depend on its neighbours.

Top-k, top-p and min-p need no sort. While probabilities are written, the tokens above each of a few levels and their
mass are counted. The highest level that all tokens to keep must reach leaves few candidates, which are moved together;
one program per row then finds the smallest probability that is kept, by bisection over its bits. Only rows that ask for
it take part.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl

PART = 4096
"""Tokens of a row that one program works on."""
LEVELS = 16
"""From the largest probability of a row down, the last above zero."""
CANDIDATES = 16384
"""Memory per row for tokens that top-k or top-p may keep; with more of them the row is worked on in place."""
MIN_TEMPERATURE = 1e-30
"""Below this, logits divided by the temperature could be infinite, and their softmax undefined."""


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first largest of each row.

    logits: [R, V] float32 or bfloat16
    Returns [R] int64.
    """
    if not gpu.suits(logits):
        return logits.argmax(-1)
    rows = logits.shape[0]
    logits = logits.contiguous()
    best = _launch_parts(logits, None, None)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        parts = best.shape[1]
        gpu.launch(_first_largest, (rows,), best, out, parts, num_warps=1, PARTS=gpu.next_power_of_2(parts))
    return out


def sampling_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The distribution that sampling draws from: temperature, then top-k, then top-p, then min-p, renormalised.

    logits: [R, V] float32; on a GPU also bfloat16
    temperature: [R] float32; 0 puts all mass on the first largest logit
    top_k: [R] int64, 0 for all; top_p: [R] float32 in (0, 1]; min_p: [R] float32 in [0, 1);
        None where no row uses it. Of tokens equally likely the first are kept.
    out: [R, V] float32, contiguous, for the result; made where not given
    Returns [R, V] float32, rows sum to 1.
    """
    if gpu.suits(logits, temperature, top_k, top_p, min_p):
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if out is None else out
        _launch_probs(logits.contiguous(), temperature, top_k, top_p, min_p, out)
        return out
    probs = _probs_reference(logits, temperature, top_k, top_p, min_p)
    return probs if out is None else out.copy_(probs)


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


def _probs_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature.clamp(min=MIN_TEMPERATURE))
    probs = torch.softmax(logits / divisor[:, None], dim=-1)
    if top_k is not None or top_p is not None:
        probs = _truncate(probs, top_k, top_p)
    if min_p is not None:
        probs = torch.where(probs < min_p[:, None] * probs.amax(-1, keepdim=True), 0.0, probs)
    probs = probs / probs.sum(-1, keepdim=True)
    if bool(greedy.any()):
        one_hot = torch.zeros_like(probs).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(greedy[:, None], one_hot, probs)
    return probs


def _truncate(probs: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Keep the top_k likeliest tokens, and of their renormalised mass the smallest set that reaches top_p."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(probs.shape[-1], device=probs.device)
        ordered = torch.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0.0, ordered)
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if top_p is not None:
        mass_before = ordered.cumsum(-1) - ordered
        cut = mass_before >= top_p[:, None]
        cut[:, 0] = False
        ordered = torch.where(cut & (top_p[:, None] < 1.0), 0.0, ordered)
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def _launch_parts(logits: torch.Tensor, temperature: torch.Tensor | None, sums: torch.Tensor | None) -> torch.Tensor:
    """The first largest logit of each part [R, ⌈V / PART⌉], packed; with a temperature also the parts' sums."""
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


def _launch_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, vocab_size = logits.shape
    if not rows:
        return
    parts = gpu.cdiv(vocab_size, PART)
    padded_parts = gpu.next_power_of_2(parts)
    sums = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    best = _launch_parts(logits, temperature, sums)
    truncates = not (top_k is None and top_p is None and min_p is None)
    counts, masses, peak = sums, sums, sums
    if truncates:
        counts = torch.empty(rows, parts, LEVELS, dtype=torch.int32, device=logits.device)
        masses = torch.empty(rows, parts, LEVELS, dtype=torch.float32, device=logits.device)
        peak = torch.empty(rows, dtype=torch.float32, device=logits.device)
    rules = tuple(temperature if rule is None else rule for rule in (top_k, top_p, min_p))
    given = {"HAS_TOP_K": top_k is not None, "HAS_TOP_P": top_p is not None, "HAS_MIN_P": min_p is not None}
    gpu.launch(
        _normalise,
        (rows, parts),
        logits,
        temperature,
        *rules,
        best,
        sums,
        out,
        counts,
        masses,
        peak,
        vocab_size,
        parts,
        num_warps=8,
        **given,
        PARTS=padded_parts,
        LEVELS=LEVELS,
        CHUNK=256,
        BLOCK=PART,
    )
    if not truncates:
        return
    values = torch.empty(rows, CANDIDATES, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, CANDIDATES, dtype=torch.int32, device=logits.device)
    above = (counts, masses, peak, values, index, out, vocab_size, parts)
    sizes = {"PARTS": padded_parts, "LEVELS": LEVELS, "CANDIDATES": CANDIDATES, "BLOCK": PART}
    gpu.launch(_gather_candidates, (rows, parts), temperature, *rules, *above, **given, **sizes, CHUNK=1024)
    gpu.launch(_truncate_rows, (rows,), temperature, *rules, *above, num_warps=16, **given, **sizes)


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
def _packed(x, index):  # type: ignore[no-untyped-def]
    """An int64 that grows with x, and falls with the index among equals. NaN counts as the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def _value_of(packed):  # type: ignore[no-untyped-def]
    """The float32 in it."""
    key = (packed >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _index_of(packed):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@jit
def _divisor(temperature):  # type: ignore[no-untyped-def]
    return tl.where(temperature == 0.0, 1.0, tl.maximum(temperature, 1e-30))


@jit
def _exponential(x, largest, divisor):  # type: ignore[no-untyped-def]
    """e^((x - largest) / divisor); 0 for x = -∞, also where nothing is larger."""
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp(tl.math.div_rn(x - finite, tl.zeros_like(x) + divisor))


@jit(varying=("temperature",))
def _parts_of_rows(  # type: ignore[no-untyped-def]
    logits, temperature, best, sums, vocab_size, parts, WITH_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row and part."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < vocab_size
    x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    first = tl.max(tl.where(mask, _packed(x, offsets), -0x7FFFFFFFFFFFFFFF), 0)
    tl.store(best + row * parts + part, first)
    if WITH_SUMS:
        divisor = _divisor(tl.load(temperature + row))
        tl.store(sums + row * parts + part, tl.sum(_exponential(x, _value_of(first), divisor), 0))


@jit
def _first_largest(best, out, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PARTS)
    packed = tl.load(best + row * parts + index, mask=index < parts, other=-0x7FFFFFFFFFFFFFFF)
    tl.store(out + row, _index_of(tl.max(packed, 0)))


@jit
def _rules_of(  # type: ignore[no-untyped-def]
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
def _levels(peak, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Probabilities that lie ever further below the largest, ``peak``; powers of two apart, so exact."""
    i = tl.arange(0, LEVELS)
    ratio = ((127 - i - i * i // 8) << 23).to(tl.float32, bitcast=True)
    above_zero = tl.full((LEVELS,), 1, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(i == LEVELS - 1, above_zero, peak * ratio)


@jit(varying=("temperature", "top_k", "top_p", "min_p"))
def _normalise(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    best,
    sums,
    out,
    counts,
    masses,
    peak,
    vocab_size,
    parts,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write probabilities; count those of rows to truncate by level. One program per row and part."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    index = tl.arange(0, PARTS)
    bests = tl.load(best + row * parts + index, mask=index < parts, other=-0x7FFFFFFFFFFFFFFF)
    packed = tl.max(bests, 0)
    largest = _value_of(packed)
    given = tl.load(temperature + row)
    divisor = _divisor(given)
    part_sums = tl.load(sums + row * parts + index, mask=index < parts, other=0.0)
    scaled = part_sums * _exponential(_value_of(bests), largest, divisor)
    total = tl.sum(tl.where(part_sums > 0.0, scaled, part_sums), 0)
    inverse = tl.math.div_rn(1.0, total)
    truncates = False
    if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
        _k, _p, _least, truncates = _rules_of(
            temperature, top_k, top_p, min_p, row, vocab_size, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P
        )
    if truncates:
        tl.store(peak + row, inverse)
        thresholds = _levels(inverse, LEVELS)
        count = tl.zeros((CHUNK, LEVELS), tl.int32)
        mass = tl.zeros((CHUNK, LEVELS), tl.float32)
        for start in range(part * BLOCK, tl.minimum(part * BLOCK + BLOCK, vocab_size), CHUNK):
            offsets = start + tl.arange(0, CHUNK)
            mask = offsets < vocab_size
            x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            probs = _exponential(x, largest, divisor) * inverse
            tl.store(out + row * vocab_size + offsets, probs, mask=mask)
            above = (probs[:, None] >= thresholds[None, :]) & mask[:, None]
            count += above.to(tl.int32)
            mass += tl.where(above, probs[:, None], 0.0)
        at = (row * parts + part) * LEVELS + tl.arange(0, LEVELS)
        tl.store(counts + at, tl.sum(count, 0))
        tl.store(masses + at, tl.sum(mass, 0))
    else:
        offsets = part * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < vocab_size
        if given == 0.0:
            probs = tl.where(offsets == _index_of(packed), 1.0, 0.0)
        else:
            x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            probs = _exponential(x, largest, divisor) * inverse
        tl.store(out + row * vocab_size + offsets, probs, mask=mask)


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
    thresholds = _levels(peak, LEVELS)
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
):
    """Move tokens that may be kept together, in their order, and leave zeros. One program per row and part."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k, p, least, truncates = _rules_of(
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
):
    """Find the smallest probability to keep, and how many of its equals; write what is kept. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    k, p, least, truncates = _rules_of(
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


@jit
def _mass_of_parts(probs, masses, vocab_size, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row and part."""
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
    probs, uniform, masses, out, vocab_size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PARTS)
    mass = tl.load(masses + row * parts + index, mask=index < parts, other=0.0)
    part, threshold = part_to_draw_from(mass, tl.load(uniform + row), PARTS)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(probs + row * vocab_size + offsets, mask=offsets < vocab_size, other=0.0)
    tl.store(out + row, token_to_draw(p.to(tl.float64), offsets, threshold, vocab_size).to(tl.int64))
