"""Which drafts of every chain to keep and the token that follows, without a round trip to the host.

Floor: one read of one row of the target's and of the draft's probabilities per chain; limited by memory, at few chains
by launches. What is left of p after a rejection, max(p - q, 0), is never stored: its mass is summed by part, and the
part that holds the drawn token is computed again.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.random_uniform import ACCEPT_STREAM, FINAL_STREAM, random_uniform, uniform
from nextn.kernels.row_parts import PART
from nextn.kernels.sample_tokens import part_to_draw_from, sample_tokens, token_to_draw

NO_TOKEN = -1
"""Stands beyond the end of a chain, and of what was decided."""


def verify_greedy_chains(target_tokens: torch.Tensor, draft_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep drafts as long as each equals the target's most likely token.

    target_tokens: [S, k + 1] int64, the target's choice after the root and after each draft
    draft_tokens: [S, k] int64, NO_TOKEN beyond a chain's end
    Returns the number of accepted drafts [S] int64, and what was decided [S, k + 1] int64: the accepted drafts, the
    token that follows them, then NO_TOKEN.
    Raises ValueError if k differs between the two.
    """
    num_seqs, num_drafts = draft_tokens.shape
    check_widths(target_tokens.shape[1], num_drafts)
    if not gpu.suits(target_tokens, draft_tokens):
        num_accepted = (target_tokens[:, :num_drafts] == draft_tokens).to(torch.int64).cumprod(1).sum(1)
        return num_accepted, compact(draft_tokens, num_accepted, target_tokens.gather(1, num_accepted[:, None])[:, 0])
    num_accepted = torch.empty(num_seqs, dtype=torch.int64, device=draft_tokens.device)
    tokens = torch.empty_like(target_tokens, memory_format=torch.contiguous_format)
    if num_seqs:
        gpu.launch(
            _greedy_chains,
            (gpu.cdiv(num_seqs, 32),),
            target_tokens.contiguous(),
            draft_tokens.contiguous(),
            num_accepted,
            tokens,
            num_seqs,
            num_drafts,
            num_warps=1,
            WIDTH=gpu.next_power_of_2(num_drafts + 1),
            BLOCK=32,
        )
    return num_accepted, tokens


def verify_chains(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    draft_tokens: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling: the kept tokens are distributed exactly as the target's (Leviathan et al., 2023, alg. 1).

    A draft d is accepted with probability min(1, p(d) / q(d)). The token after the accepted run is drawn from
    max(p - q, 0), renormalised, after a rejection, and from p after the last draft. Greedy chains are a case of it,
    with one-hot rows; so a batch may mix both.

    target_probs: [S, k + 1, V] float32, rows sum to 1
    draft_probs: [S, k, V] float32, the distributions that the drafts were drawn from; rows may lie anywhere, and mean
        nothing beyond a chain's end. None where drafts were chosen without chance, each with probability 1
    draft_tokens: [S, k] int64, NO_TOKEN beyond a chain's end
    seeds: [S] int64; positions: [S] int64, of the token that the first row decides
    Returns the number of accepted drafts [S] int64, and what was decided [S, k + 1] int64: the accepted drafts, the
    token that follows them, then NO_TOKEN.
    Raises ValueError if k differs between the arguments.
    """
    num_drafts = draft_tokens.shape[1]
    check_widths(target_probs.shape[1], num_drafts)
    if draft_probs is not None:
        check_widths(target_probs.shape[1], draft_probs.shape[1])
    if gpu.suits(target_probs, draft_probs, draft_tokens, seeds, positions):
        return _launch_chains(target_probs.contiguous(), draft_probs, draft_tokens.contiguous(), seeds, positions)
    if draft_probs is None:
        draft_probs = one_hot(draft_tokens, target_probs.shape[2])
    else:
        draft_probs = draft_probs.masked_fill((draft_tokens == NO_TOKEN)[:, :, None], 0.0)
    rows = positions[:, None] + torch.arange(num_drafts + 1, device=positions.device)
    num_accepted, final = accept_and_draw(
        target_probs,
        draft_probs,
        draft_tokens,
        random_uniform(seeds, rows[:, :num_drafts], ACCEPT_STREAM),
        random_uniform(seeds, rows, FINAL_STREAM),
    )
    return num_accepted, compact(draft_tokens, num_accepted, final)


def accept_and_draw(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_tokens: torch.Tensor,
    accept_uniform: torch.Tensor,
    final_uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verify_chains' rule in torch, given its random numbers.

    draft_probs: [S, k, V] float32, zero rows beyond a chain's end
    accept_uniform: [S, k] float64 in [0, 1); final_uniform: [S, k + 1] float64 in [0, 1)
    Returns the number of accepted drafts [S] int64 and the token that follows them [S] int64.
    """
    num_drafts = draft_tokens.shape[1]
    index = draft_tokens.clamp(min=0)[:, :, None]
    p = target_probs[:, :num_drafts].gather(2, index)[:, :, 0]
    q = draft_probs.gather(2, index)[:, :, 0]
    accepted = (accept_uniform * q < p) & (draft_tokens != NO_TOKEN)
    num_accepted = accepted.cumprod(1).sum(1)

    rows = torch.arange(target_probs.shape[0], device=target_probs.device)
    final_p = target_probs[rows, num_accepted]
    no_q = draft_probs.new_zeros(draft_probs.shape[0], 1, draft_probs.shape[2])
    residual = (final_p - torch.cat([draft_probs, no_q], dim=1)[rows, num_accepted]).clamp_(min=0)
    # p = q up to rounding can leave no residual; then a rejection had probability zero, and p is the limit.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, final_p)
    return num_accepted, sample_tokens(residual, final_uniform[rows, num_accepted])


def one_hot(draft_tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[S, k, V] float32: all mass on the draft, zero rows beyond a chain's end."""
    exists = (draft_tokens != NO_TOKEN).to(torch.float32)[:, :, None]
    zeros = torch.zeros(*draft_tokens.shape, vocab_size, device=draft_tokens.device)
    return zeros.scatter_(2, draft_tokens.clamp(min=0)[:, :, None], exists)


def compact(draft_tokens: torch.Tensor, num_accepted: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """[S, k + 1]: the accepted drafts, the token that follows, then NO_TOKEN."""
    padded = torch.cat([draft_tokens, final[:, None]], dim=1)
    column = torch.arange(padded.shape[1], device=padded.device)
    decided = torch.where(column < num_accepted[:, None], padded, NO_TOKEN)
    return decided.scatter_(1, num_accepted[:, None], final[:, None])


def check_widths(num_target_rows: int, num_drafts: int) -> None:
    """Raise ValueError unless there is one target row more than drafts."""
    if num_target_rows != num_drafts + 1:
        raise ValueError(f"{num_drafts} drafts need {num_drafts + 1} target rows, found {num_target_rows}")


def _launch_chains(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    draft_tokens: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_seqs, width, vocab_size = target_probs.shape
    device = target_probs.device
    num_accepted = torch.empty(num_seqs, dtype=torch.int64, device=device)
    tokens = torch.empty(num_seqs, width, dtype=torch.int64, device=device)
    if not num_seqs:
        return num_accepted, tokens
    parts = gpu.cdiv(vocab_size, PART)
    masses = torch.empty(2, num_seqs, parts, dtype=torch.float64, device=device)
    refused = torch.empty(num_seqs, dtype=torch.int64, device=device)
    if draft_probs is not None and draft_probs.stride(-1) != 1:
        draft_probs = draft_probs.contiguous()
    q, strides = (target_probs, (0, 0)) if draft_probs is None else (draft_probs, draft_probs.stride()[:2])
    chains = (target_probs, q, *strides, draft_tokens, seeds, positions, num_accepted, refused, masses)
    constants = {"NUM_DRAFTS": width - 1, "HAS_Q": draft_probs is not None, "BLOCK": PART}
    gpu.launch(_sum_residuals, (num_seqs, parts), *chains, num_seqs, vocab_size, parts, **constants)
    gpu.launch(
        _decide_chains,
        (num_seqs,),
        *chains,
        tokens,
        num_seqs,
        vocab_size,
        parts,
        num_warps=8,
        **constants,
        WIDTH=gpu.next_power_of_2(width),
        PARTS=gpu.next_power_of_2(parts),
    )
    return num_accepted, tokens


@jit(varying=("target_tokens", "draft_tokens", "num_seqs", "num_drafts"))
def _greedy_chains(  # type: ignore[no-untyped-def]
    target_tokens,
    draft_tokens,
    num_accepted,
    tokens,
    num_seqs,
    num_drafts,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK chains per program."""
    wait_for_predecessor(EARLY)
    seq = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    exists = (seq < num_seqs)[:, None]
    at = seq[:, None] * (num_drafts + 1) + column[None, :]
    target = tl.load(target_tokens + at, mask=exists & (column <= num_drafts)[None, :], other=0)
    is_draft = exists & (column < num_drafts)[None, :]
    draft = tl.load(draft_tokens + seq[:, None] * num_drafts + column[None, :], mask=is_draft, other=0)
    accepted = tl.min(tl.where(is_draft & (draft == target), WIDTH, column[None, :]), 1)
    tl.store(num_accepted + seq, accepted.to(tl.int64), mask=seq < num_seqs)
    decided = tl.where(column[None, :] <= accepted[:, None], target, -1)
    tl.store(tokens + at, decided, mask=exists & (column <= num_drafts)[None, :])


@jit
def _accepted_run(  # type: ignore[no-untyped-def]
    target_probs,
    draft_rows,
    stride_draft,
    draft_tokens,
    seq,
    seed,
    position,
    vocab_size,
    NUM_DRAFTS: tl.constexpr,
    HAS_Q: tl.constexpr,
):
    """How many drafts of a chain are accepted, and the draft that is not: NO_TOKEN where none was refused."""
    accepted = tl.zeros((), tl.int32)
    refused = tl.full((), -1, tl.int64)
    for j in tl.static_range(NUM_DRAFTS):
        draft = tl.load(draft_tokens + seq * NUM_DRAFTS + j)
        at = tl.maximum(draft, 0)
        p = tl.load(target_probs + (seq * (NUM_DRAFTS + 1) + j) * vocab_size + at)
        q = 1.0
        if HAS_Q:
            q = tl.load(draft_rows + tl.full((), j, tl.int64) * stride_draft + at).to(tl.float64)
        kept = (uniform(seed, position + j, 1) * q < p) & (draft >= 0)
        runs = accepted == j
        refused = tl.where(runs & (kept == 0), draft, refused)
        accepted += (runs & kept).to(tl.int32)
    return accepted, refused


@jit
def _residual(  # type: ignore[no-untyped-def]
    target_row, draft_row, refused, part, vocab_size, HAS_Q: tl.constexpr, BLOCK: tl.constexpr
):
    """A part of the row after the accepted run: p and max(p - q, 0), both float64, and its token ids."""
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(target_row + offsets, mask=offsets < vocab_size, other=0.0)
    if HAS_Q:
        q = tl.load(draft_row + offsets, mask=offsets < tl.where(refused >= 0, vocab_size, 0), other=0.0)
        rest = tl.maximum(p - q, 0.0)
    else:
        rest = tl.where(offsets == refused, 0.0, p)
    return p.to(tl.float64), rest.to(tl.float64), offsets


@jit(varying=("draft_tokens", "seeds", "positions", "num_seqs"))
def _sum_residuals(  # type: ignore[no-untyped-def]
    target_probs,
    draft_probs,
    stride_seq,
    stride_draft,
    draft_tokens,
    seeds,
    positions,
    num_accepted,
    refused_drafts,
    masses,
    num_seqs,
    vocab_size,
    parts,
    NUM_DRAFTS: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The accepted run, and sums of p and of max(p - q, 0) over one part of one chain's last row."""
    wait_for_predecessor(EARLY)
    seq = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    accepted, refused = _accepted_run(
        target_probs,
        draft_probs + seq * stride_seq,
        stride_draft,
        draft_tokens,
        seq,
        tl.load(seeds + seq),
        tl.load(positions + seq),
        vocab_size,
        NUM_DRAFTS,
        HAS_Q,
    )
    target_row = target_probs + (seq * (NUM_DRAFTS + 1) + accepted) * vocab_size
    draft_row = draft_probs + seq * stride_seq + accepted.to(tl.int64) * stride_draft
    p, rest, _offsets = _residual(target_row, draft_row, refused, part, vocab_size, HAS_Q, BLOCK)
    tl.store(masses + seq * parts + part, tl.sum(p, 0))
    tl.store(masses + (num_seqs + seq) * parts + part, tl.sum(rest, 0))
    if part == 0:
        tl.store(num_accepted + seq, accepted.to(tl.int64))
        tl.store(refused_drafts + seq, refused)


@jit(varying=("draft_tokens", "seeds", "positions", "num_seqs"))
def _decide_chains(  # type: ignore[no-untyped-def]
    target_probs,
    draft_probs,
    stride_seq,
    stride_draft,
    draft_tokens,
    seeds,
    positions,
    num_accepted,
    refused_drafts,
    masses,
    tokens,
    num_seqs,
    vocab_size,
    parts,
    NUM_DRAFTS: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Draw the token after the accepted run. One program per chain."""
    wait_for_predecessor(EARLY)
    seq = tl.program_id(0).to(tl.int64)
    accepted, refused = tl.load(num_accepted + seq), tl.load(refused_drafts + seq)
    index = tl.arange(0, PARTS)
    mass_p = tl.load(masses + seq * parts + index, mask=index < parts, other=0.0)
    mass_rest = tl.load(masses + (num_seqs + seq) * parts + index, mask=index < parts, other=0.0)
    # p = q up to rounding can leave no residual; then a rejection had probability zero, and p is the limit.
    has_rest = tl.sum(mass_rest, 0) > 0.0
    number = uniform(tl.load(seeds + seq), tl.load(positions + seq) + accepted, 2)
    part, threshold = part_to_draw_from(tl.where(has_rest, mass_rest, mass_p), number, PARTS)
    target_row = target_probs + (seq * (NUM_DRAFTS + 1) + accepted) * vocab_size
    draft_row = draft_probs + seq * stride_seq + accepted.to(tl.int64) * stride_draft
    p, rest, offsets = _residual(target_row, draft_row, refused, part, vocab_size, HAS_Q, BLOCK)
    final = token_to_draw(tl.where(has_rest, rest, p), offsets, threshold, vocab_size).to(tl.int64)
    column = tl.arange(0, WIDTH)
    drafts = tl.load(draft_tokens + seq * NUM_DRAFTS + column, mask=column < NUM_DRAFTS, other=-1)
    decided = tl.where(column < accepted, drafts, tl.where(column == accepted, final, -1))
    tl.store(tokens + seq * (NUM_DRAFTS + 1) + column, decided, mask=column <= NUM_DRAFTS)
