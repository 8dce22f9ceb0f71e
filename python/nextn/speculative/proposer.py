"""The NextN layer as a drafter: it keeps up with what was decided, and proposes a chain of tokens.

The layer's entry for position i is made of the target's hidden state at i - 1 and the token at i, and is stored in slot
i of the KV pool's last layer (GLM-4.5 technical report; DeepSeek-V3, section 2.2). So an entry depends on nothing to
its right, and a page of the prefix cache holds draft entries that are valid for whatever follows it. Slot 0 has no
entry, and attention starts at key 1.

A sequence's entries may lag behind its tokens (``Sequence.num_draft_computed``): a prompt chunk's are made with it,
those of decided tokens when drafts next start from them. Of all but the newest only the key and value are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from nextn.layers.batch import ExtendBatch, make_chain_batches, place_tokens
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence
from nextn.speculative.hidden_states import HiddenStates
from nextn.speculative.logits import Row

FIRST_KEY = 1
"""The first slot that holds an entry of the draft layer."""

MAX_MISSING = 48
"""Entries that a sequence may lack while nothing is drafted for it; then they are made, all sequences' in one go."""

ChooseTokens = Callable[[torch.Tensor, list[Row]], tuple[torch.Tensor, torch.Tensor | None]]
"""(logits [R, V], rows) → tokens [R] int64, and the probabilities [R, V] they were drawn from (None if all greedy)."""


@dataclass(frozen=True)
class Drafts:
    """Chains of drafts, one per drafting extend, in order.

    tokens: a list of num_drafts tokens each
    probs: [n, k, V] float32, zero where a chain is shorter; None if every chain is greedy
    """

    tokens: list[list[int]]
    probs: torch.Tensor | None


class NextNProposer:
    """Runs the draft model over the engine's KV pool, and owns the hidden states that it needs between steps."""

    def __init__(self, draft: Glm4MoeForCausalLMNextN, kv_cache: KVCache, *, max_running: int, page_size: int) -> None:
        self._draft = draft
        self._kv_cache = kv_cache
        self._page_size = page_size
        self._device = kv_cache.k.device
        like = torch.empty(draft.config.hidden_size, dtype=draft.dtype, device=self._device)
        self.hidden_states = HiddenStates(kv_cache.k.shape[1], page_size, max_running, like)

    def propose(self, extends: list[Extend], choose: ChooseTokens) -> Drafts:
        """Draft ``num_drafts`` ≥ 1 tokens for each extend, feeding the head its own normed output."""
        tokens: list[list[int]] = [[] for _ in extends]
        all_probs: torch.Tensor | None = None
        active = list(range(len(extends)))
        ids, hidden, first = self._newest_entries([extend.seq for extend in extends])
        step = 0
        while active:
            until = min(extends[i].num_drafts for i in active)
            for batch in self._chain([extends[i] for i in active], step, until):
                hidden = self._draft.forward(ids, hidden, batch if step else first(batch), self._kv_cache)
                logits = self._draft.compute_logits(hidden)
                ids, probs = choose(logits, [Row(extends[i].seq, tokens[i]) for i in active])
                for i, token in zip(active, ids.tolist(), strict=True):
                    tokens[i] = [*tokens[i], token]
                if probs is not None:
                    if all_probs is None:
                        all_probs = probs.new_zeros(len(extends), max(e.num_drafts for e in extends), probs.shape[-1])
                    all_probs[active, step] = probs
                step += 1
            rows = [row for row, i in enumerate(active) if extends[i].num_drafts > step]
            if rows:
                hidden, ids = hidden[rows], ids[rows]
            active = [active[row] for row in rows]
        return Drafts(tokens, all_probs)

    def catch_up(self, extends: list[Extend], hidden: torch.Tensor) -> list[int]:
        """Make the entries of prompt chunks, and of decided tokens where too many are missing.

        hidden: [T, H] the target's hidden states, num_tokens + num_drafts rows per extend
        Returns each sequence's new ``num_draft_computed``.
        """
        # Before drafting, a sequence has caught up with all its tokens.
        done = [extend.end if extend.num_drafts else extend.seq.num_draft_computed for extend in extends]
        is_due = any(extend.end - so_far >= MAX_MISSING for extend, so_far in zip(extends, done, strict=True))
        spans: list[tuple[int, int]] = []
        ids: list[int] = []
        pages: list[list[int]] = []
        rows: list[int] = []  # of ``hidden``; where the state is older than this step, any
        kept: list[int] = []
        homes: list[int] = []
        row = 0
        for i, extend in enumerate(extends):
            seq, first = extend.seq, max(done[i], FIRST_KEY)
            if (is_due or extend.num_tokens > 1) and first < extend.end:
                older = range(first - 1, max(extend.start, first - 1))
                kept += range(len(ids), len(ids) + len(older))
                homes += self.hidden_states.homes(seq, older)
                rows += [row] * len(older)
                rows += range(row + older.stop - extend.start, row + extend.num_tokens - 1)
                ids += seq.tokens[first : extend.end]
                spans.append((first, extend.end - first))
                pages.append(seq.pages)
                done[i] = extend.end
            row += extend.num_tokens + extend.num_drafts
        if ids:
            if len(kept) == len(ids):
                inputs = self.hidden_states.load(homes)
            else:
                inputs = hidden.index_select(0, self._indices(rows))
                inputs.index_copy_(0, self._indices(kept), self.hidden_states.load(homes))
            positions, slot_mapping = place_tokens(spans, pages, self._page_size, self._device)
            self._draft.write_kv(self._indices(ids), inputs, positions, slot_mapping, self._kv_cache)
        return done

    def _newest_entries(
        self, seqs: list[Sequence]
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[ExtendBatch], ExtendBatch]]:
        """Inputs of every entry that is missing, the newest last: its output is what drafts start from.

        Returns token ids [T], hidden states [T, H], and what makes of the newest entries' batch that of all.
        """
        ids: list[int] = []
        homes: list[int] = []
        spans: list[tuple[int, int]] = []
        for seq in seqs:
            first, end = max(seq.num_draft_computed, FIRST_KEY), len(seq.tokens)
            ids += seq.tokens[first:]
            homes += self.hidden_states.homes(seq, range(first - 1, end - 1))
            spans.append((first, end - first))
        inputs = self._indices(ids), self.hidden_states.load(homes)
        if len(ids) == len(seqs):
            return *inputs, lambda newest: newest
        positions, slot_mapping = place_tokens(spans, [seq.pages for seq in seqs], self._page_size, self._device)
        rows = self._indices([end - 1 for end in accumulate(length for _, length in spans)])
        return *inputs, lambda newest: ExtendBatch(positions, slot_mapping, newest.layout, rows)

    def _chain(self, extends: list[Extend], step: int, until: int) -> list[ExtendBatch]:
        """The batches of draft steps ``step`` … ``until`` - 1."""
        return make_chain_batches(
            [extend.start + step for extend in extends],
            until - step,
            [extend.seq.pages for extend in extends],
            self._page_size,
            self._device,
            first_key=FIRST_KEY,
        )

    def _indices(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
