"""What decoding needs of every running sequence, on the device, by slot.

Decode steps read and advance it without the CPU, so that one can be launched before the tokens of the last are known.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from nextn.kernels.gpu import upload
from nextn.kernels.penalties import LogitRules, count_tokens
from nextn.protocol.ranks import NewSequence, SlotPatch
from nextn.scheduler.sequence import Sequence

MAX_BIASES = 1024
MAX_STOP_IDS = 160
"""What there is memory for per slot; sequences that ask for more are not decoded this way."""


class DecodeState:
    """Tensors of num_slots rows, and one more that padding writes to.

    tokens: [num_slots + 1, width] int64; num_tokens, token_limit, seed, top_k: [num_slots + 1] int64
    page_table: [num_slots + 1, max_pages] int64; pages that a sequence does not have are the scratch page
    temperature, top_p, min_p: [num_slots + 1] float32
    rules: what is asked of the logits
    reach: how many tokens before a sequence's last one a step reads, to make their entries of the draft layer
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        context_length: int,
        max_drafts: int,
        page_size: int,
        scratch_page: int,
        device: torch.device,
    ) -> None:
        self.scratch_row = num_slots
        self.page_size = page_size
        self.scratch_page = scratch_page
        self.device = device
        rows = num_slots + 1
        # A step that runs on after a sequence's end may add a chain twice, and look at keys that far.
        self.width = context_length + 2 * (max_drafts + 1)
        self.context_length = context_length
        self.reach = max_drafts + 1
        max_pages = -(-self.width // page_size)
        self.tokens = torch.zeros(rows, self.width, dtype=torch.int64, device=device)
        self.num_tokens = torch.ones(rows, dtype=torch.int64, device=device)
        self.token_limit = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self.page_table = torch.full((rows, max_pages), scratch_page, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(rows, device=device)
        self.top_p = torch.ones(rows, device=device)
        self.min_p = torch.zeros(rows, device=device)
        self.rules = LogitRules.for_slots(
            rows, vocab_size, max_bias=MAX_BIASES, max_stop_ids=MAX_STOP_IDS, device=device
        )
        self._with_rules: set[int] = set()

    def forget_padding(self) -> None:
        """The row that padding writes to, which a step reads only where there is nothing but padding, begins anew."""
        self.num_tokens[self.scratch_row].fill_(1)

    def apply(self, patches: Rows[SlotPatch]) -> None:
        """Write patches, in stream order: steps that were launched before do not see them."""
        if not patches:
            return
        self._begin([(patch, patch.new) for patch in patches if patch.new is not None])
        self._count([patch for patch in patches if patch.new is None and patch.slot in self._with_rules])
        self._put(self.tokens, [(p.slot * self.width + p.first_token, p.tokens) for p in patches if p.tokens])
        max_pages = self.page_table.shape[1]
        self._put(self.page_table, [(p.slot * max_pages + p.first_page, p.pages) for p in patches if p.pages])
        self._put(self.num_tokens, [(p.slot, [p.first_token + len(p.tokens)]) for p in patches if p.tokens])

    def mask(self, slots: Rows[int], allowed: np.ndarray) -> None:
        """Allow the sequences in some slots these tokens next. allowed: [n, ⌈V / 32⌉] int32, as LogitRules has it"""
        where = upload(slots, dtype=torch.int64, device=self.device)
        self.rules.mask(where, upload(allowed, device=self.device))

    def _begin(self, patches: Rows[tuple[SlotPatch, NewSequence]]) -> None:
        """Sequences that are new in their slots."""
        if not patches:
            return
        sampling = [new.sampling for _, new in patches]
        slots, limits, seeds, top_ks = self._upload(
            [
                [patch.slot for patch, _ in patches],
                [new.token_limit for _, new in patches],
                [one.seed for one in sampling],
                [one.top_k for one in sampling],
            ],
            torch.int64,
        )
        temperatures, top_ps, min_ps = self._upload(
            [[one.temperature for one in sampling], [one.top_p for one in sampling], [one.min_p for one in sampling]],
            torch.float32,
        )
        self.token_limit[slots], self.seed[slots], self.top_k[slots] = limits, seeds, top_ks
        self.temperature[slots], self.top_p[slots], self.min_p[slots] = temperatures, top_ps, min_ps
        self.page_table.index_fill_(0, slots, self.scratch_page)
        self.rules.unmask(slots)
        for patch, new in patches:
            if new.sampling.has_rules:
                self._assign_rules(patch, new)
            elif patch.slot in self._with_rules:
                self._with_rules.remove(patch.slot)
                self.rules.assign(patch.slot, [], [])

    def _assign_rules(self, patch: SlotPatch, new: NewSequence) -> None:
        self._with_rules.add(patch.slot)
        self.rules.assign(
            patch.slot,
            patch.tokens[: new.num_prompt],
            patch.tokens[new.num_prompt :],
            repetition=new.sampling.repetition_penalty,
            presence=new.sampling.presence_penalty,
            frequency=new.sampling.frequency_penalty,
            logit_bias=new.sampling.logit_bias,
            stop_ids=new.stop_ids,
            min_new_tokens=new.sampling.min_new_tokens,
        )

    def _count(self, patches: Rows[SlotPatch]) -> None:
        """Output tokens that another kind of step has decided."""
        for patch in patches:
            if patch.tokens:
                slot, tokens = self._upload([[patch.slot] * len(patch.tokens), patch.tokens], torch.int64)
                count_tokens(self.rules.output_counts, slot[:1], tokens[None])

    def _put(self, table: torch.Tensor, runs: Rows[tuple[int, list[int]]]) -> None:
        """Write runs of values at places of the flattened table."""
        if runs:
            places = [first + i for first, values in runs for i in range(len(values))]
            index, values = self._upload([places, [value for _, run in runs for value in run]], torch.int64)
            table.view(-1).index_copy_(0, index, values)

    def _upload(self, rows: Rows[Rows[float]], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """One copy to the device that does not wait for it."""
        return upload(rows, dtype=dtype, device=self.device).unbind()


@dataclass
class _Known:
    """seq: whose the slot was last; num_tokens, pages: what the device was told or has found out itself."""

    seq: Sequence
    num_tokens: int
    pages: list[int]


class SlotMirror:
    """What the device knows of each slot, so that it is told only what is new."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def patch(self, seq: Sequence, reach: int, *, is_ahead: bool) -> SlotPatch | None:
        """What to tell the device before its next step; None if nothing.

        reach: how far before a sequence's last token a step reads others
        is_ahead: whether a step is under way that has decided tokens which ``seq`` does not have yet
        """
        known = self._known.get(seq.slot)
        if known is None or known.seq is not seq or len(seq.pages) < len(known.pages):
            assert not is_ahead, "a sequence that is new in its slot has no step under way"
            self._known[seq.slot] = _Known(seq, len(seq.tokens), list(seq.pages))
            limit = seq.num_prompt + seq.max_new_tokens
            new = NewSequence(seq.request.sampling, seq.num_prompt, limit, sorted(seq.stop_ids))
            first = 0 if new.sampling.has_rules else max(len(seq.tokens) - 1 - reach, 0)
            return SlotPatch(seq.slot, first, seq.tokens[first:], 0, list(seq.pages), new)
        first_page = _first_difference(known.pages, seq.pages)
        tokens = [] if is_ahead else seq.tokens[known.num_tokens :]
        pages = seq.pages[first_page:]
        if not tokens and not pages:
            return None
        patch = SlotPatch(seq.slot, known.num_tokens, tokens, first_page, pages)
        known.num_tokens += len(tokens)
        known.pages[first_page:] = pages
        return patch

    def forget(self, seq: Sequence) -> None:
        """The device has decided more for a sequence than it is to have: it is told everything anew."""
        del self._known[seq.slot]

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """The device's own step has added so many tokens."""
        self._known[seq.slot].num_tokens += num_tokens


def _first_difference(known: list[int], now: list[int]) -> int:
    """The first index at which two lists differ, where ``now`` is at least as long."""
    if now[: len(known)] == known:
        return len(known)
    return next(i for i, (old, new) in enumerate(zip(known, now, strict=False)) if old != new)
