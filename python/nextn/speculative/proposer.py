"""The NextN layer as a drafter: it proposes a chain of tokens, then catches up with what was decided.

The layer's entry for position i is made of the target's hidden state at i - 1 and the token at i, and is stored in slot
i of the KV pool's last layer (GLM-4.5 technical report; DeepSeek-V3, section 2.2). So an entry depends on nothing to
its right: a page of the prefix cache holds draft entries that are valid for whatever follows it, provided the hidden
state of its last token is kept beside it (``page_hidden``). Slot 0 has no entry, and attention starts at key 1.

A sequence's newest entry is the one that drafts start from. It waits until the next step: drafting makes it with the
layer's output, and where nothing is drafted only its key and value are written, as for all older entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nextn.layers.batch import make_extend_batch, place_tokens
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.scheduler.scheduler import Extend
from nextn.speculative.logits import Row

FIRST_KEY = 1
"""The first slot that holds an entry of the draft layer."""

ChooseTokens = Callable[[torch.Tensor, list[Row]], tuple[list[int], torch.Tensor | None]]
"""(logits [R, V], rows) → R tokens, and the probabilities [R, V] they were drawn from (None if all are greedy)."""


@dataclass(frozen=True)
class Drafts:
    """Chains of drafts, one per drafting extend, in order.

    tokens: a list of num_drafts tokens each
    probs: [n, k, V] float32, zero where a chain is shorter; None if every chain is greedy
    """

    tokens: list[list[int]]
    probs: torch.Tensor | None


class NextNProposer:
    """Owns the hidden states that the draft model needs between steps, per running sequence and per page.

    hidden: [max_running, H] for each sequence, the target's hidden state at the position before its last token
    page_hidden: [num_pages, H] the target's hidden state at each page's last slot
    """

    def __init__(self, draft: Glm4MoeForCausalLMNextN, kv_cache: KVCache, *, max_running: int, page_size: int) -> None:
        self._draft = draft
        self._kv_cache = kv_cache
        self._page_size = page_size
        config, reference = draft.config, kv_cache.k
        self._device = reference.device
        self._hidden = torch.zeros(max_running, config.hidden_size, dtype=draft.dtype, device=self._device)
        self._page_hidden = torch.zeros(reference.shape[1], config.hidden_size, dtype=draft.dtype, device=self._device)

    def propose(self, extends: list[Extend], choose: ChooseTokens) -> Drafts:
        """Draft ``num_drafts`` ≥ 1 tokens for each extend, feeding the head its own normed output."""
        slots = torch.tensor([extend.seq.slot for extend in extends], device=self._device)
        hidden = self._hidden.index_select(0, slots)
        tokens: list[list[int]] = [[] for _ in extends]
        active = list(range(len(extends)))
        all_probs: torch.Tensor | None = None
        for step in range(max(extend.num_drafts for extend in extends)):
            rows = [row for row, i in enumerate(active) if extends[i].num_drafts > step]
            if len(rows) < len(active):
                hidden, active = hidden[rows], [active[row] for row in rows]
            hidden = self._forward(
                [tokens[i][-1] if step else extends[i].seq.tokens[-1] for i in active],
                hidden,
                [(extends[i].start + step, 1) for i in active],
                [extends[i].seq.pages for i in active],
            )
            logits = self._draft.compute_logits(hidden)
            chosen, probs = choose(logits, [Row(extends[i].seq, tokens[i]) for i in active])
            for i, token in zip(active, chosen, strict=True):
                tokens[i] = [*tokens[i], token]
            if probs is not None:
                if all_probs is None:
                    all_probs = probs.new_zeros(len(extends), max(e.num_drafts for e in extends), probs.shape[-1])
                all_probs[active, step] = probs
        return Drafts(tokens, all_probs)

    def remember_page_ends(self, extends: list[Extend], hidden: torch.Tensor) -> None:
        """Keep the target's hidden state of every row that is the last of its page.

        hidden: [T, H], num_tokens + num_drafts rows per extend
        """
        rows: list[int] = []
        pages: list[int] = []
        first_row = 0
        for extend in extends:
            num_rows = extend.num_tokens + extend.num_drafts
            first_page = extend.start // self._page_size
            ends = range(first_page * self._page_size + self._page_size - 1, extend.start + num_rows, self._page_size)
            rows += [first_row + position - extend.start for position in ends]
            pages += extend.seq.pages[first_page : first_page + len(ends)]
            first_row += num_rows
        if rows:
            self._page_hidden[pages] = hidden[rows]

    def catch_up(self, extends: list[Extend], decided: list[list[int]], hidden: torch.Tensor) -> list[bool]:
        """Write the entries of all positions whose token and preceding hidden state are now known, but the newest.

        decided: the tokens each extend decided
        hidden: [T, H] the target's hidden states, num_tokens + num_drafts rows per extend
        Returns, per extend, whether the sequence can draft from its last token in the next step.
        """
        ids: list[int] = []
        sources: list[int] = []  # rows of ``hidden``; -1 where the state was kept from an earlier step
        spans: list[tuple[int, int]] = []
        from_page: list[tuple[int, int]] = []
        from_slot: list[tuple[int, int]] = []
        newest: list[tuple[int, int]] = []
        ready: list[bool] = []
        row = 0
        for extend, new in zip(extends, decided, strict=True):
            seq = extend.seq
            known = [*seq.tokens[extend.start : extend.end + 1], *new]  # from position extend.start on
            last = min(extend.num_tokens + len(new), len(known) - 1)
            first = 1
            if seq.resumed_from_cache:
                first = 0
                from_page.append((len(ids), seq.pages[extend.start // self._page_size - 1]))
            elif seq.has_draft_state and not extend.num_drafts:
                first = 0
                from_slot.append((len(ids), seq.slot))
            is_ready = extend.start + last == len(seq.tokens) + len(new) - 1
            ready.append(is_ready)
            if is_ready:
                newest.append((seq.slot, row + last - 1))
                last -= 1
            ids += known[first : last + 1]
            sources += range(row - 1, row + last) if first == 0 else range(row, row + last)
            spans.append((extend.start + first, last + 1 - first))
            row += extend.num_tokens + extend.num_drafts
        if ids:
            inputs = hidden[torch.tensor(sources, device=self._device)]
            for entries, states in ((from_page, self._page_hidden), (from_slot, self._hidden)):
                if entries:
                    at, places = zip(*entries, strict=True)
                    inputs[list(at)] = states[list(places)]
            positions, slot_mapping = place_tokens(
                spans, [extend.seq.pages for extend in extends], self._page_size, self._device
            )
            self._draft.write_kv(
                torch.tensor(ids, device=self._device), inputs, positions, slot_mapping, self._kv_cache
            )
        if newest:
            slots, rows = zip(*newest, strict=True)
            self._hidden.index_copy_(0, torch.tensor(slots, device=self._device), self._take(hidden, list(rows)))
        return ready

    def _take(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return x.index_select(0, torch.tensor(rows, device=self._device))

    def _forward(
        self, ids: list[int], hidden: torch.Tensor, spans: list[tuple[int, int]], pages: list[list[int]]
    ) -> torch.Tensor:
        batch = make_extend_batch(spans, pages, self._page_size, self._device, first_key=FIRST_KEY)
        return self._draft.forward(torch.tensor(ids, device=self._device), hidden, batch, self._kv_cache)
