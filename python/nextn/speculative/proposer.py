"""The NextN layer as a drafter: it proposes a chain of tokens, and makes its entries of what was decided.

The layer's entry for position i is made of the target's hidden state at i - 1 and the token at i, and is stored in slot
i of the KV pool's last layer (GLM-4.5 technical report; DeepSeek-V3, section 2.2). So an entry depends on nothing to
its right, and a page of the prefix cache holds draft entries that are valid for whatever follows it. Slot 0 has no
entry, and attention starts at key 1.

Hidden states are kept by slot like keys and values, so entries can be made at any later time, by whichever sequence
needs them: where nothing is drafted, they are not made. Of all but the newest only the key and value are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from nextn.kernels.gpu import upload
from nextn.layers.batch import ExtendBatch, make_chain_batches, slots_of
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence
from nextn.speculative.logits import Row

FIRST_KEY = 1
"""The first slot that holds an entry of the draft layer."""

MAX_CATCH_UP = 2048
"""Entries made in one step, at most, beside those of the step's own tokens, for sequences that lag behind."""

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
    """Runs the draft model over the engine's KV pool.

    hidden: [num_pages · page_size, H], the target's hidden state of each slot
    """

    def __init__(self, draft: Glm4MoeForCausalLMNextN, kv_cache: KVCache) -> None:
        self.draft = draft
        self._kv_cache = kv_cache
        self._page_size = kv_cache.page_size
        self._device = kv_cache.k.device
        num_slots = kv_cache.k.shape[1] * kv_cache.page_size
        self._hidden = torch.zeros(num_slots, draft.config.hidden_size, dtype=draft.dtype, device=self._device)

    def store_hidden(self, slot_mapping: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep the target's hidden states. slot_mapping: [T] int64; hidden: [T, H]."""
        self._hidden.index_copy_(0, slot_mapping, hidden)

    def hidden_at(self, slots: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [T, H] of slots [T] int64."""
        return self._hidden.index_select(0, slots)

    def propose(self, extends: list[Extend], choose: ChooseTokens) -> Drafts:
        """Draft ``num_drafts`` ≥ 1 tokens for each extend, feeding the head its own normed output."""
        tokens: list[list[int]] = [[] for _ in extends]
        all_probs: torch.Tensor | None = None
        active = list(range(len(extends)))
        spans = [(extend.seq, max(extend.seq.num_draft_computed, FIRST_KEY), extend.end) for extend in extends]
        ids, hidden, positions, slots = self._entries(spans)
        step = 0
        while active:
            until = min(extends[i].num_drafts for i in active)
            for batch in self._chain([extends[i] for i in active], step, until):
                if step == 0 and len(ids) > len(extends):
                    batch = ExtendBatch(positions, slots, batch.layout, self._last_rows(spans))
                hidden = self.draft.forward(ids, hidden, batch, self._kv_cache)
                logits = self.draft.compute_logits(hidden)
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

    def catch_up(self, extends: list[Extend]) -> list[int]:
        """Make the entries of prompt chunks, and of sequences that lag behind, where drafts are wanted.

        Returns each sequence's new ``num_draft_computed``.
        """
        done: list[int] = []
        spans: list[tuple[Sequence, int, int]] = []
        budget = MAX_CATCH_UP
        for extend in extends:
            seq = extend.seq
            # Drafting begins with an entry of the last known token.
            num_computed = extend.end if extend.num_drafts else seq.num_draft_computed
            if extend.wants_drafts and num_computed < extend.end:
                stop = min(extend.end, num_computed + extend.num_tokens + budget)
                budget -= max(stop - num_computed - extend.num_tokens, 0)
                if stop > max(num_computed, FIRST_KEY):
                    spans.append((seq, max(num_computed, FIRST_KEY), stop))
                num_computed = stop
            done.append(num_computed)
        if spans:
            ids, hidden, positions, slots = self._entries(spans)
            self.draft.write_kv(ids, hidden, positions, slots, self._kv_cache)
        return done

    def _entries(
        self, spans: list[tuple[Sequence, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the entries of positions start … stop - 1 are made of, for each (sequence, start ≥ 1, stop).

        Returns token ids [T], hidden states [T, H], positions [T] and slots [T].
        """
        ids: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for seq, start, stop in spans:
            of_all = slots_of(range(start - 1, stop), seq.pages, self._page_size)
            ids += seq.tokens[start:stop]
            sources += of_all[:-1]
            positions += range(start, stop)
            slots += of_all[1:]
        rows = upload(ids + sources + positions + slots, device=self._device).view(4, -1)
        return rows[0], self.hidden_at(rows[1]), rows[2], rows[3]

    def _last_rows(self, spans: list[tuple[Sequence, int, int]]) -> torch.Tensor:
        """Of each span among the entries of all."""
        ends = accumulate(stop - start for _, start, stop in spans)
        return upload([end - 1 for end in ends], device=self._device)

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
