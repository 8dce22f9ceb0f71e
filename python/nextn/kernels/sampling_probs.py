"""The distribution that sampling draws from.

Floor: one read of the logits [R, V] and one write of the probabilities, in float32; limited by memory, at few rows by
launches.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.row_parts import (
    MIN_TEMPERATURE,
    PART,
    divisor_of,
    exponential,
    index_of,
    largest_of_parts,
    packed_of_row,
    value_of,
)
from nextn.kernels.truncation import (
    LEVELS,
    Levels,
    Truncation,
    levels_below,
    rules_of,
    truncate_counted,
    truncate_reference,
)


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
    rules = Truncation(top_k, top_p, min_p)
    if gpu.suits(logits, temperature, *rules):
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if out is None else out
        _launch_probs(logits.contiguous(), temperature, rules, out)
        return out
    probs = _probs_reference(logits, temperature, rules)
    return probs if out is None else out.copy_(probs)


def _probs_reference(logits: torch.Tensor, temperature: torch.Tensor, rules: Truncation) -> torch.Tensor:
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature.clamp(min=MIN_TEMPERATURE))
    probs = truncate_reference(torch.softmax(logits / divisor[:, None], dim=-1), rules)
    probs = probs / probs.sum(-1, keepdim=True)
    if bool(greedy.any()):
        one_hot = torch.zeros_like(probs).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(greedy[:, None], one_hot, probs)
    return probs


def _launch_probs(logits: torch.Tensor, temperature: torch.Tensor, rules: Truncation, out: torch.Tensor) -> None:
    rows, vocab_size = logits.shape
    if not rows:
        return
    parts = gpu.cdiv(vocab_size, PART)
    sums = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    best = largest_of_parts(logits, temperature, sums)
    given = rules.given()
    truncates = any(given.values())
    levels = Levels.of_rows(rows, parts, logits.device) if truncates else Levels(sums, sums, sums)
    gpu.launch(
        _normalise,
        (rows, parts),
        logits,
        temperature,
        *rules.tensors(temperature),
        best,
        sums,
        out,
        *levels,
        vocab_size,
        parts,
        num_warps=8,
        **given,
        PARTS=gpu.next_power_of_2(parts),
        LEVELS=LEVELS,
        CHUNK=256,
        BLOCK=PART,
    )
    if truncates:
        truncate_counted(out, temperature, rules, levels)


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
    EARLY: tl.constexpr,
):
    """Write probabilities; count those of rows to truncate by level. One program per row and part."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    index = tl.arange(0, PARTS)
    bests = packed_of_row(best, row, parts, PARTS)
    packed = tl.max(bests, 0)
    largest = value_of(packed)
    given = tl.load(temperature + row)
    divisor = divisor_of(given)
    part_sums = tl.load(sums + row * parts + index, mask=index < parts, other=0.0)
    scaled = part_sums * exponential(value_of(bests), largest, divisor)
    total = tl.sum(tl.where(part_sums > 0.0, scaled, part_sums), 0)
    inverse = tl.math.div_rn(1.0, total)
    truncates = False
    if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
        _k, _p, _least, truncates = rules_of(
            temperature, top_k, top_p, min_p, row, vocab_size, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P
        )
    if truncates:
        tl.store(peak + row, inverse)
        thresholds = levels_below(inverse, LEVELS)
        count = tl.zeros((CHUNK, LEVELS), tl.int32)
        mass = tl.zeros((CHUNK, LEVELS), tl.float32)
        for start in range(part * BLOCK, tl.minimum(part * BLOCK + BLOCK, vocab_size), CHUNK):
            offsets = start + tl.arange(0, CHUNK)
            mask = offsets < vocab_size
            x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            probs = exponential(x, largest, divisor) * inverse
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
            probs = tl.where(offsets == index_of(packed), 1.0, 0.0)
        else:
            x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            probs = exponential(x, largest, divisor) * inverse
        tl.store(out + row * vocab_size + offsets, probs, mask=mask)
