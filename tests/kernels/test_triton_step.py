"""Triton's bookkeeping of a decode step against torch's, and both against plain lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nextn.kernels.commit_tokens import commit_tokens
from nextn.kernels.step_layout import StepLayout, lay_out_step, rules_of_rows
from nextn.kernels.verify import NO_TOKEN

from tests.kernels.references import in_torch

NUM_SLOTS, CONTEXT, MAX_DRAFTS, VOCAB = 7, 45, 5, 24
WIDTH = CONTEXT + 2 * (MAX_DRAFTS + 1)
NUM_KNOWN = MAX_DRAFTS + 2
READ = [4, 0, 6, 2, 5, 1, 3]
NUM_TOKENS = [1, 2, NUM_KNOWN, 30, CONTEXT - 1, CONTEXT, CONTEXT + 1]
"""Of the slots in READ's order: the shortest, the ends of the context, and two steps beyond an end."""


def slots_and_sizes(
    num_seqs: int, num_padding: int, page_size: int, num_drafts: int
) -> tuple[list[Any], dict[str, int]]:
    """lay_out_step's arguments. Padding reads what the first sequence reads, and writes to the last row."""
    max_pages = -(-WIDTH // page_size)
    num_tokens = torch.ones(NUM_SLOTS + 1, dtype=torch.int64)
    num_tokens[READ] = torch.tensor(NUM_TOKENS)
    scratch_page = NUM_SLOTS * max_pages
    page_table = torch.randperm(scratch_page).view(NUM_SLOTS, max_pages)
    page_table[:, -(-CONTEXT // page_size) :] = scratch_page
    tensors = [
        torch.tensor(READ[:num_seqs] + READ[:1] * num_padding),
        torch.tensor(READ[:num_seqs] + [NUM_SLOTS] * num_padding),
        torch.randint(0, num_drafts + 1, (num_seqs + num_padding,)),
        torch.randint(0, VOCAB, (NUM_SLOTS + 1, WIDTH)),
        num_tokens,
        num_tokens + torch.randint(-1, 8, num_tokens.shape),
        torch.randint(-(2**63), 2**63 - 1, num_tokens.shape),
        torch.cat([page_table, torch.full((1, max_pages), scratch_page)]),
    ]
    sizes = {
        "num_drafts": num_drafts,
        "num_known": NUM_KNOWN if num_drafts else 0,
        "page_size": page_size,
        "context_length": CONTEXT,
        "scratch_page": scratch_page,
    }
    return tensors, sizes


CASES = [
    (num_seqs, num_padding, page_size, num_drafts)
    for num_drafts in range(MAX_DRAFTS + 1)
    for num_seqs, num_padding, page_size in ((1, 0, 16), (3, 2, 1), (7, 1, 4), (7, 0, 64))
]


@pytest.mark.parametrize(("num_seqs", "num_padding", "page_size", "num_drafts"), CASES)
def test_a_step_is_laid_out_as_in_torch(
    num_seqs: int, num_padding: int, page_size: int, num_drafts: int, device: torch.device
) -> None:
    tensors, sizes = slots_and_sizes(num_seqs, num_padding, page_size, num_drafts)
    expected = in_torch(lay_out_step, *tensors, **sizes)
    found = lay_out_step(*(x.to(device) for x in tensors), **sizes)
    for field in dataclasses.fields(StepLayout):
        got, wanted = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "ids":
            assert got.shape == wanted.shape
            got, wanted = got[:, 0], wanted[:, 0]  # drafts are still to be written
        if field.name == "known_roots" and not num_drafts:
            continue  # no known tokens, no places among them
        assert torch.equal(got.cpu(), wanted), field.name
        assert got.dtype == wanted.dtype, field.name


@pytest.mark.parametrize(("num_seqs", "num_padding", "page_size", "num_drafts"), CASES)
def test_tokens_stand_where_their_pages_are(
    num_seqs: int, num_padding: int, page_size: int, num_drafts: int, poisoned_memory: None
) -> None:
    tensors, sizes = slots_and_sizes(num_seqs, num_padding, page_size, num_drafts)
    layout = in_torch(lay_out_step, *tensors, **sizes)
    read, write, wanted, tokens, num_tokens, limit, seeds, page_table = (x.tolist() for x in tensors)
    scratch = sizes["scratch_page"] * page_size

    def slot_of(i: int, position: int) -> int:
        return page_table[read[i]][position // page_size] * page_size + position % page_size

    def places(i: int, first: int, num: int) -> Iterator[tuple[int, int]]:
        for position in range(first, first + num):
            is_kept = write[i] != NUM_SLOTS and position < CONTEXT
            yield min(position, CONTEXT - 1), slot_of(i, position) if is_kept else scratch

    n, last = sizes["num_known"], num_drafts + 1
    for i, slot in enumerate(read):
        length = num_tokens[slot]
        assert layout.page_table[i].tolist() == page_table[slot]
        assert layout.seeds[i] == seeds[slot]
        assert layout.ids[i, 0] == tokens[slot][length - 1]
        chain = list(places(i, length - 1, last))
        assert list(zip(layout.positions[i].tolist(), layout.slots[i].tolist(), strict=True)) == chain
        by_step = (layout.draft_positions[:, i].tolist(), layout.draft_slots[:, i].tolist())
        assert list(zip(*by_step, strict=True)) == chain
        assert layout.num_tokens[:, i].tolist() == list(range(length, length + last))
        room = min(wanted[i], max(limit[slot] - length - 1, 0))
        assert layout.is_beyond[i].tolist() == [j >= room for j in range(num_drafts)]
        for j in range(n):
            position, at = length - n + j, i * n + j
            ((where, kept),) = places(i, max(position, 0), 1)
            assert layout.known_ids[at] == tokens[slot][max(position, 0)]
            assert layout.known_positions[at] == where
            assert layout.known_slots[at] == (kept if position >= 1 else scratch)
            assert layout.known_sources[at] == slot_of(i, max(position - 1, 0))
    assert layout.cu_seqlens_q.tolist() == [i * last for i in range(len(read) + 1)]
    assert layout.draft_cu_seqlens_q.tolist() == list(range(len(read) + 1))
    if n:
        assert layout.known_roots.tolist() == [i * n + n - 1 for i in range(len(read))]
    in_use = layout.slots[layout.slots != scratch].tolist()
    assert len(set(in_use)) == len(in_use), "two tokens share a slot"


@pytest.mark.parametrize("rows_per_seq", [1, 4])
def test_every_row_gets_the_rules_of_its_sequence(rows_per_seq: int, device: torch.device) -> None:
    slots = torch.randint(0, NUM_SLOTS, (50,))
    rules = [torch.rand(NUM_SLOTS), torch.randint(0, 2**40, (NUM_SLOTS,)), torch.rand(NUM_SLOTS), torch.rand(NUM_SLOTS)]
    rows = [slot for slot in slots.tolist() for _ in range(rows_per_seq)]
    found = rules_of_rows(slots.to(device), rows_per_seq, *(rule.to(device) for rule in rules))
    for got, in_reference, rule in zip(found, in_torch(rules_of_rows, slots, rows_per_seq, *rules), rules, strict=True):
        assert got.dtype == in_reference.dtype == rule.dtype
        assert torch.equal(got.cpu(), rule[rows])
        assert torch.equal(in_reference, rule[rows])


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("num_drafts", range(MAX_DRAFTS + 1))
def test_decided_tokens_become_known(num_drafts: int, counts: bool, device: torch.device) -> None:
    (read, write, _, tokens, num_tokens, *_), _ = slots_and_sizes(7, 3, 4, num_drafts)
    decided = torch.randint(0, VOCAB, (len(read), num_drafts + 1))
    num_accepted = torch.randint(0, num_drafts + 1, (len(read),))
    decided[torch.arange(num_drafts + 1) > num_accepted[:, None]] = NO_TOKEN
    lengths, output_counts = num_tokens[read], torch.randint(0, 3, (NUM_SLOTS + 1, VOCAB), dtype=torch.int32)
    expected, expected_counts = tokens[:-1].tolist(), output_counts[:-1].tolist()
    for slot, new in zip(read[:7].tolist(), decided[:7].tolist(), strict=True):
        kept = [token for token in new if token != NO_TOKEN]
        length = int(num_tokens[slot])
        expected[slot] = expected[slot][:length] + kept
        for token in kept if counts else []:
            expected_counts[slot][token] += 1

    def committed(run: Any, on: torch.device) -> None:
        state = [x.clone().to(on) for x in (tokens, num_tokens, output_counts)]
        run(commit_tokens, *(x.to(on) for x in (decided, lengths, write)), *state[:2], state[2] if counts else None)
        found_tokens, found_lengths, found_counts = (x.tolist() for x in state)
        for slot in range(NUM_SLOTS):
            num = int(num_tokens[slot]) + int(num_accepted[READ.index(slot)]) + 1
            assert found_lengths[slot] == num
            assert found_tokens[slot][:num] == expected[slot][:num]
        assert found_counts[:-1] == expected_counts

    committed(in_torch, torch.device("cpu"))
    committed(lambda function, *arguments: function(*arguments), device)


def test_padding_that_runs_on_for_ever_writes_to_its_own_row(device: torch.device) -> None:
    tokens, num_tokens = torch.zeros(3, WIDTH, dtype=torch.int64), torch.tensor([4, 5, WIDTH - 1])
    decided = torch.ones(2, 4, dtype=torch.int64)
    lengths, write = torch.tensor([WIDTH - 1, 3 * WIDTH]), torch.tensor([1, 1])
    for run in (in_torch, lambda function, *arguments: function(*arguments)):
        where = torch.device("cpu") if run is in_torch else device
        state = [x.clone().to(where) for x in (tokens, num_tokens)]
        run(commit_tokens, *(x.to(where) for x in (decided, lengths, write)), *state, None)
        assert state[0][[0, 2]].tolist() == [[0] * WIDTH] * 2
        assert state[1][[0, 2]].tolist() == [4, WIDTH - 1]
