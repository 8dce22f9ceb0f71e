"""Where the tokens of a decode step stand, and what their rows are drawn by, from what is kept by slot.

Floor: one read and write of the sequences' rows of the page table; limited by launches, so all of it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor


@dataclass(frozen=True)
class StepLayout:
    """A step of S sequences, each with its last known token, the root, and k drafts behind it.

    page_table: [S, max_pages] int64, the sequences' rows
    seeds: [S] int64
    ids, positions, slots: [S, k + 1] int64, of the roots and the drafts; of ids, the drafts are still to be written
    cu_seqlens_q: [S + 1] int64, where each sequence begins among these
    is_beyond: [S, k] bool, the drafts that a sequence has no use for, whatever they are
    num_tokens: [k + 1, S] int64, how many tokens each sequence has with its first 0 … k drafts
    draft_positions, draft_slots: [k + 1, S] int64, as positions and slots, step by step
    draft_cu_seqlens_q: [S + 1] int64, for one token of each sequence
    known_ids, known_positions, known_slots: [S · n] int64, the last n known tokens of each sequence, and where their
        entries of the draft layer go
    known_sources: [S · n] int64, the slots of the tokens before them
    known_roots: [S] int64, the roots' places among the S · n
    """

    page_table: torch.Tensor
    seeds: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    is_beyond: torch.Tensor
    num_tokens: torch.Tensor
    draft_positions: torch.Tensor
    draft_slots: torch.Tensor
    draft_cu_seqlens_q: torch.Tensor
    known_ids: torch.Tensor
    known_positions: torch.Tensor
    known_slots: torch.Tensor
    known_sources: torch.Tensor
    known_roots: torch.Tensor


def lay_out_step(
    read: torch.Tensor,
    write: torch.Tensor,
    wanted_drafts: torch.Tensor,
    tokens: torch.Tensor,
    num_tokens: torch.Tensor,
    token_limit: torch.Tensor,
    seeds: torch.Tensor,
    page_table: torch.Tensor,
    *,
    num_drafts: int,
    num_known: int,
    page_size: int,
    context_length: int,
    scratch_page: int,
) -> StepLayout:
    """Lay out a step with num_drafts drafts, and num_known known tokens of each sequence.

    read, write: [S ≥ 1] int64, the slots that sequences are read from and written to; padding writes to the last row
    wanted_drafts: [S] int64; no more are of use, nor more than a sequence may have tokens, less the one after them
    tokens: [num_rows, width] int64; num_tokens ≥ 1, token_limit, seeds: [num_rows] int64
    page_table: [num_rows, max_pages] int64, enough for width tokens
    page_size: a power of two

    A step that runs on after a sequence's end may leave the context. What is beyond it stands at the last position, and
    is written to the first slot of the scratch page, as padding is, and the known token at 0, which has no entry.
    """
    sizes = (num_drafts, num_known, page_size, context_length, scratch_page * page_size)
    if gpu.suits(read, tokens):
        return _launch_layout(read, write, wanted_drafts, tokens, num_tokens, token_limit, seeds, page_table, *sizes)
    return _layout(read, write, wanted_drafts, tokens, num_tokens, token_limit, seeds, page_table, *sizes)


def rules_of_rows(
    slots: torch.Tensor,
    rows_per_seq: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """What rows of logits are drawn by. slots: [S] int64; the rules: [num_slots], top_k int64, the others float32.

    Returns the rules of every row, [S · rows_per_seq] each.
    """
    rules = (temperature, top_k, top_p, min_p)
    num_rows = slots.shape[0] * rows_per_seq
    if not gpu.suits(slots, *rules):
        slots = slots.repeat_interleave(rows_per_seq, output_size=num_rows)
        return tuple(rule[slots] for rule in rules)
    of_rows = tuple(torch.empty(num_rows, dtype=rule.dtype, device=slots.device) for rule in rules)
    if num_rows:
        gpu.launch(
            _rules_of_rows, (gpu.cdiv(num_rows, 128),), slots, *rules, *of_rows, num_rows, rows_per_seq, BLOCK=128
        )
    return of_rows


def _layout(
    read: torch.Tensor,
    write: torch.Tensor,
    wanted_drafts: torch.Tensor,
    tokens: torch.Tensor,
    num_tokens: torch.Tensor,
    token_limit: torch.Tensor,
    seeds: torch.Tensor,
    page_table: torch.Tensor,
    num_drafts: int,
    num_known: int,
    page_size: int,
    context_length: int,
    scratch_slot: int,
) -> StepLayout:
    pages, device = page_table[read], read.device
    is_real = (write != tokens.shape[0] - 1)[:, None]

    def slots_of(positions: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        page = pages.gather(1, (positions // page_size).clamp(max=pages.shape[1] - 1))
        return torch.where(is_kept, page * page_size + positions % page_size, scratch_slot)

    length = num_tokens[read]
    lengths = length[:, None] + torch.arange(num_drafts + 1, device=device)
    inside = lengths <= context_length
    positions = (lengths - 1).clamp(max=context_length - 1)
    slots = slots_of(positions, is_real & inside)
    ids = torch.full_like(positions, 0)
    ids[:, 0] = tokens[read, length - 1]

    room = torch.minimum(wanted_drafts, token_limit[read] - length - 1)
    is_beyond = torch.arange(num_drafts, device=device) >= room[:, None]

    known = length[:, None] + torch.arange(-num_known, 0, device=device)
    before = (known - 1).clamp(min=0)
    each = torch.arange(read.shape[0] + 1, device=device)
    return StepLayout(
        page_table=pages,
        seeds=seeds[read],
        ids=ids,
        positions=positions,
        slots=slots,
        cu_seqlens_q=each * (num_drafts + 1),
        is_beyond=is_beyond,
        num_tokens=lengths.t().contiguous(),
        draft_positions=positions.t().contiguous(),
        draft_slots=slots.t().contiguous(),
        draft_cu_seqlens_q=each,
        known_ids=tokens[read[:, None], known.clamp(min=0)].view(-1),
        known_positions=known.clamp(0, context_length - 1).view(-1),
        known_slots=slots_of(known.clamp(min=0), is_real & (known >= 1) & (known < context_length)).view(-1),
        known_sources=slots_of(before, before < context_length).view(-1),
        known_roots=each[1:] * num_known - 1,
    )


def _launch_layout(
    read: torch.Tensor,
    write: torch.Tensor,
    wanted_drafts: torch.Tensor,
    tokens: torch.Tensor,
    num_tokens: torch.Tensor,
    token_limit: torch.Tensor,
    seeds: torch.Tensor,
    page_table: torch.Tensor,
    num_drafts: int,
    num_known: int,
    page_size: int,
    context_length: int,
    scratch_slot: int,
) -> StepLayout:
    num_seqs, (num_rows, width), max_pages = read.shape[0], tokens.shape, page_table.shape[1]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=read.device)

    pages = empty(num_seqs, max_pages)
    by_seq, by_step = empty(3, num_seqs, num_drafts + 1), empty(3, num_drafts + 1, num_seqs)
    known, ends, single = empty(4, num_seqs * num_known), empty(2, num_seqs + 1), empty(2, num_seqs)
    is_beyond = torch.empty(num_seqs, num_drafts, dtype=torch.bool, device=read.device)
    block = 1024
    gpu.launch(
        _lay_out_sequences,
        (num_seqs, gpu.cdiv(max_pages, block)),
        *(read, write, wanted_drafts, tokens, num_tokens, token_limit, seeds, page_table),
        *(pages, by_seq, by_step, known, ends, single, is_beyond),
        num_seqs,
        num_drafts,
        num_known,
        num_rows,
        width,
        max_pages,
        context_length,
        scratch_slot,
        PAGE_SIZE=page_size,
        WIDTH=gpu.next_power_of_2(num_drafts + 1),
        KNOWN=gpu.next_power_of_2(max(num_known, 1)),
        BLOCK=block,
    )
    ids, positions, slots = by_seq.unbind()
    lengths, draft_positions, draft_slots = by_step.unbind()
    known_ids, known_positions, known_slots, known_sources = known.unbind()
    return StepLayout(
        page_table=pages,
        seeds=single[0],
        ids=ids,
        positions=positions,
        slots=slots,
        cu_seqlens_q=ends[0],
        is_beyond=is_beyond,
        num_tokens=lengths,
        draft_positions=draft_positions,
        draft_slots=draft_slots,
        draft_cu_seqlens_q=ends[1],
        known_ids=known_ids,
        known_positions=known_positions,
        known_slots=known_slots,
        known_sources=known_sources,
        known_roots=single[1],
    )


@jit
def _slots_of(pages, positions, is_kept, scratch_slot, PAGE_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Slots of positions ≥ 0 on a sequence's pages; the scratch slot for those that are not kept."""
    page = tl.load(pages + positions // PAGE_SIZE, mask=is_kept, other=0)
    return tl.where(is_kept, page * PAGE_SIZE + positions % PAGE_SIZE, scratch_slot)


@jit(varying=("read", "write", "wanted_drafts", "num_seqs", "num_drafts", "num_known"))
def _lay_out_sequences(  # type: ignore[no-untyped-def]
    read,
    write,
    wanted_drafts,
    tokens,
    num_tokens,
    token_limit,
    seeds,
    page_table,
    out_pages,
    by_seq,
    by_step,
    known,
    ends,
    single,
    is_beyond,
    num_seqs,
    num_drafts,
    num_known,
    num_rows,
    width,
    max_pages,
    context_length,
    scratch_slot,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (sequence, part of its pages); the first part's does all the rest."""
    wait_for_predecessor(EARLY)
    seq = tl.program_id(0).to(tl.int64)
    slot = tl.load(read + seq)
    pages = page_table + slot * max_pages
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(pages + places, mask=places < max_pages, other=0)
    tl.store(out_pages + seq * max_pages + places, page, mask=places < max_pages)
    if tl.program_id(1) == 0:
        end = tl.where(tl.load(write + seq) == num_rows - 1, 0, context_length)  # of what is kept
        length = tl.load(num_tokens + slot)
        row = tokens + slot * width
        tl.store(single + seq, tl.load(seeds + slot))
        tl.store(single + num_seqs + seq, (seq + 1) * num_known - 1)
        edges = seq + tl.arange(0, 2)
        tl.store(ends + edges, edges * (num_drafts + 1))
        tl.store(ends + num_seqs + 1 + edges, edges)

        column = tl.arange(0, WIDTH)
        exists = column <= num_drafts
        lengths = length + column
        positions = tl.minimum(lengths, context_length) - 1
        slots = _slots_of(pages, positions, exists & (lengths <= end), scratch_slot, PAGE_SIZE)
        plane = num_seqs * (num_drafts + 1)
        at = by_seq + seq * (num_drafts + 1) + column
        tl.store(at, tl.load(row + length - 1 + column, mask=column == 0, other=0), mask=column == 0)
        tl.store(at + plane, positions, mask=exists)
        tl.store(at + 2 * plane, slots, mask=exists)
        at = by_step + column * num_seqs + seq
        tl.store(at, lengths, mask=exists)
        tl.store(at + plane, positions, mask=exists)
        tl.store(at + 2 * plane, slots, mask=exists)
        room = tl.minimum(tl.load(wanted_drafts + seq), tl.load(token_limit + slot) - length - 1)
        tl.store(is_beyond + seq * num_drafts + column, column >= room, mask=column < num_drafts)

        column = tl.arange(0, KNOWN)
        exists = column < num_known
        positions = length - num_known + column
        has_entry = exists & (positions >= 1) & (positions < end)
        positions = tl.maximum(positions, 0)
        before = tl.maximum(positions - 1, 0)
        plane = num_seqs * num_known
        at = known + seq * num_known + column
        tl.store(at, tl.load(row + positions, mask=exists, other=0), mask=exists)
        tl.store(at + plane, tl.minimum(positions, context_length - 1), mask=exists)
        tl.store(at + 2 * plane, _slots_of(pages, positions, has_entry, scratch_slot, PAGE_SIZE), mask=exists)
        is_kept = exists & (before < context_length)
        tl.store(at + 3 * plane, _slots_of(pages, before, is_kept, scratch_slot, PAGE_SIZE), mask=exists)


@jit(varying=("slots", "num_rows", "rows_per_seq"))
def _rules_of_rows(  # type: ignore[no-untyped-def]
    slots,
    temperature,
    top_k,
    top_p,
    min_p,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    num_rows,
    rows_per_seq,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_predecessor(EARLY)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    slot = tl.load(slots + rows // rows_per_seq, mask=mask, other=0)
    tl.store(temperatures + rows, tl.load(temperature + slot, mask=mask), mask=mask)
    tl.store(top_ks + rows, tl.load(top_k + slot, mask=mask), mask=mask)
    tl.store(top_ps + rows, tl.load(top_p + slot, mask=mask), mask=mask)
    tl.store(min_ps + rows, tl.load(min_p + slot, mask=mask), mask=mask)
