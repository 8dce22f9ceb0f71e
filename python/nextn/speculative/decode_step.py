"""One decode step over tensors alone: draft k tokens, verify them, accept, and set up the next step.

It is ``cycle.py``'s step for sequences that only decode, written so that nothing of it waits for the CPU: shapes depend
on the number of sequences and of drafts alone, and what the next step starts from stays in ``DecodeState``. So it can
be recorded as a CUDA graph, and launched before the tokens of the step before are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.argmax import argmax
from nextn.kernels.paged_attention import AttentionLayout
from nextn.kernels.penalties import adjust_logits_by_slot, count_tokens
from nextn.kernels.random_uniform import DRAFT_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.kernels.sampling_probs import sampling_probs
from nextn.kernels.verify import NO_TOKEN, verify_chains, verify_greedy_chains
from nextn.layers.batch import ExtendBatch
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.proposer import FIRST_KEY, NextNProposer


@dataclass(frozen=True)
class DecodeRows:
    """The S sequences of a step, padded to a size that is recorded.

    read: [S] int64, the slots; padding repeats the first, so that it touches no other experts
    write: [S] int64, the same; padding writes to the scratch row
    wanted_drafts: [S] int64, at most the step's number of drafts
    """

    read: torch.Tensor
    write: torch.Tensor
    wanted_drafts: torch.Tensor


class DecodeStep:
    """The step over the engine's models, KV pool and state."""

    def __init__(
        self,
        target: Glm4MoeForCausalLM,
        proposer: NextNProposer | None,
        kv_cache: KVCache,
        state: DecodeState,
        tp: TensorParallel = SINGLE,
    ) -> None:
        self._tp = tp
        self._target = target
        self._proposer = proposer
        self._kv_cache = kv_cache
        self._state = state
        self._scratch_slot = state.scratch_page * state.page_size

    @torch.inference_mode()
    def run(self, rows: DecodeRows, num_drafts: int, *, is_greedy: bool) -> torch.Tensor:
        """Advance every sequence by 1 … num_drafts + 1 tokens.

        is_greedy: whether all sequences take the likeliest tokens as the model gives them
        Returns [S, num_drafts + 2] int64: the number of accepted drafts, then these, the token after them, and -1s.
        """
        state = self._state
        num_tokens = state.num_tokens.index_select(0, rows.read)
        places = _Places.of(state, rows, num_tokens - 1, num_drafts, self._scratch_slot)
        choice = _Choice.of(state, rows.read, num_tokens, is_greedy)

        draft_tokens, draft_probs = self._draft(places, num_drafts, choice)
        ids = torch.cat([places.root_tokens[:, None], draft_tokens], 1)
        hidden = self._target.forward(ids.view(-1), places.verify_batch(), self._kv_cache)
        if self._proposer is not None:
            self._proposer.store_hidden(places.slots.view(-1), hidden)
        logits = self._target.compute_logits(hidden)

        room = state.token_limit.index_select(0, rows.read) - num_tokens - 1
        num_chained = torch.minimum(rows.wanted_drafts, room.clamp(min=0))
        beyond = torch.arange(num_drafts, device=room.device) >= num_chained[:, None]
        num_accepted, tokens = self._accept(choice, logits, draft_tokens.masked_fill(beyond, NO_TOKEN), draft_probs)
        decided = self._tp.broadcast(torch.cat([num_accepted[:, None], tokens], 1))
        self._commit(rows.write, num_tokens, decided, is_greedy=is_greedy)
        return decided

    def _draft(self, places: _Places, num_drafts: int, choice: _Choice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns drafts [S, num_drafts] int64, and the probabilities they were drawn from, None if all greedy."""
        num_seqs = places.root.shape[0]
        tokens = places.root.new_empty(num_seqs, num_drafts)
        if num_drafts == 0:
            return tokens, None
        assert self._proposer is not None, "drafts are asked for only where there is a draft model"
        vocab_size = self._target.config.vocab_size
        probs = None if choice.is_greedy else choice.new_probs(num_drafts, vocab_size)
        ids, hidden_slots, batch = places.first_draft()
        hidden = self._proposer.hidden_at(hidden_slots)
        for step in range(num_drafts):
            if step:
                ids, batch = tokens[:, step - 1].contiguous(), places.next_draft(step)
            hidden = self._proposer.draft.forward(ids, hidden, batch, self._kv_cache)
            logits = self._proposer.draft.compute_logits(hidden)
            chosen = choice.draft(logits, tokens, step, None if probs is None else probs[step])
            tokens[:, step] = self._tp.broadcast(chosen)
        return tokens, None if probs is None else probs.transpose(0, 1)

    def _accept(
        self, choice: _Choice, logits: torch.Tensor, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: [S · (k + 1), V]; draft_tokens: [S, k], NO_TOKEN beyond a chain's end; draft_probs: [S, k, V]

        Returns the number of accepted drafts [S], and these with the token after them, then NO_TOKEN, [S, k + 1].
        """
        return choice.verify(logits, draft_tokens, draft_probs)

    def _commit(self, write: torch.Tensor, num_tokens: torch.Tensor, decided: torch.Tensor, *, is_greedy: bool) -> None:
        """Append tokens to the state; what stands beyond num_tokens is never read. decided: as ``run`` returns it."""
        state, num_accepted, tokens = self._state, decided[:, 0], decided[:, 1:]
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        columns = (num_tokens[:, None] + offsets).clamp(max=state.width - 1)
        index = write[:, None] * state.width + columns
        state.tokens.view(-1).index_copy_(0, index.view(-1), tokens.clamp(min=0).view(-1))
        state.num_tokens.index_copy_(0, write, num_tokens + num_accepted + 1)
        if not is_greedy:
            count_tokens(state.rules.output_counts, write, tokens)


@dataclass(frozen=True)
class _Choice:
    """How the sequences choose their tokens. slots, num_tokens, seeds: [S] int64."""

    state: DecodeState
    slots: torch.Tensor
    num_tokens: torch.Tensor
    seeds: torch.Tensor
    is_greedy: bool

    @classmethod
    def of(cls, state: DecodeState, slots: torch.Tensor, num_tokens: torch.Tensor, is_greedy: bool) -> _Choice:
        return cls(state, slots, num_tokens, state.seed.index_select(0, slots), is_greedy)

    def new_probs(self, num_drafts: int, vocab_size: int) -> torch.Tensor:
        """Memory for what drafts are drawn from, [num_drafts, S, V] float32."""
        return torch.empty(num_drafts, self.slots.shape[0], vocab_size, device=self.slots.device)

    def draft(
        self, logits: torch.Tensor, draft_tokens: torch.Tensor, step: int, probs: torch.Tensor | None
    ) -> torch.Tensor:
        """One draft per sequence, [S] int64.

        logits: [S, V] float32, overwritten; draft_tokens: [S, k], of which ``step`` are known
        probs: [S, V] float32, for the probabilities it is drawn from; None if all are greedy
        """
        if probs is None:
            return argmax(logits)
        self._probs(logits, self.slots, draft_tokens, step, out=probs)
        return sample_tokens(probs, random_uniform(self.seeds, self.num_tokens + step, DRAFT_STREAM))

    def verify(
        self, logits: torch.Tensor, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecodeStep._accept``."""
        num_seqs, num_drafts = draft_tokens.shape
        if self.is_greedy:
            return verify_greedy_chains(argmax(logits).view(num_seqs, -1), draft_tokens)
        probs = self._probs(logits, self.slots.repeat_interleave(num_drafts + 1), draft_tokens, 0)
        return verify_chains(
            probs.view(num_seqs, num_drafts + 1, -1), draft_probs, draft_tokens, self.seeds, self.num_tokens
        )

    def _probs(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        draft_tokens: torch.Tensor,
        num_before: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What rows are drawn from, [R, V]; slots: [R], each row's. For others see ``adjust_logits_by_slot``."""
        state = self.state
        logits = adjust_logits_by_slot(
            logits, state.rules, self.slots, self.num_tokens, draft_tokens, num_before=num_before, out=logits
        )
        of_slot = (state.temperature, state.top_k, state.top_p, state.min_p)
        return sampling_probs(logits, *(values.index_select(0, slots) for values in of_slot), out=out)


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a step stand.

    root: [S] int64, the position of each sequence's last known token; root_tokens: [S], those tokens
    slots: [S, k + 1] int64, of positions root … root + k
    """

    state: DecodeState
    rows: DecodeRows
    root: torch.Tensor
    root_tokens: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    scratch_slot: int

    @classmethod
    def of(
        cls, state: DecodeState, rows: DecodeRows, root: torch.Tensor, num_drafts: int, scratch_slot: int
    ) -> _Places:
        pages = state.page_table.index_select(0, rows.read)
        offsets = torch.arange(num_drafts + 1, device=root.device)
        slots = _slots_at(state, rows, pages, root[:, None] + offsets, scratch_slot)
        return cls(state, rows, root, _tokens_at(state, rows, root[:, None])[:, 0], pages, slots, scratch_slot)

    def verify_batch(self) -> ExtendBatch:
        width = self.slots.shape[1]
        offsets = torch.arange(width, device=self.root.device)
        positions = self._in_context(self.root[:, None] + offsets)
        return ExtendBatch(positions.view(-1), self.slots.view(-1), self._layout(self.root, width, 0))

    def first_draft(self) -> tuple[torch.Tensor, torch.Tensor, ExtendBatch]:
        """The entries of the last reach + 1 known tokens, which may be missing whatever the last steps drafted.

        Returns token ids and the slots of the hidden states before them, [S · (reach + 1)] each, and their batch, of
        which only each sequence's last output is read.
        """
        num_seqs, width = self.root.shape[0], self.state.reach + 1
        positions = self.root[:, None] + torch.arange(1 - width, 1, device=self.root.device)
        has_entry = positions >= FIRST_KEY
        before = (positions - 1).clamp(min=0)
        slots = _slots_at(self.state, self.rows, self.pages, positions.clamp(min=0), self.scratch_slot)
        slots = torch.where(has_entry, slots, self.scratch_slot)
        sources = _slots_of(self.state, self.pages, before)
        batch = ExtendBatch(
            positions.clamp(min=0).view(-1),
            slots.view(-1),
            self._layout(self.root, 1, FIRST_KEY),
            torch.arange(width - 1, num_seqs * width, width, device=self.root.device),
        )
        return _tokens_at(self.state, self.rows, positions.clamp(min=0)).view(-1), sources.view(-1), batch

    def next_draft(self, step: int) -> ExtendBatch:
        """One token per sequence, ``step`` behind the root."""
        positions = self._in_context(self.root + step)
        return ExtendBatch(positions, self.slots[:, step].contiguous(), self._layout(positions, 1, FIRST_KEY))

    def _layout(self, starts: torch.Tensor, num_queries: int, first_key: int) -> AttentionLayout:
        num_seqs = starts.shape[0]
        cu_seqlens_q = torch.arange(0, num_seqs * num_queries + 1, num_queries, device=starts.device)
        return AttentionLayout(starts, cu_seqlens_q, self.pages, self.state.page_size, first_key, num_queries)

    def _in_context(self, positions: torch.Tensor) -> torch.Tensor:
        """A step that runs on after a sequence's end may leave the context; what it computes there is not kept."""
        return positions.clamp(max=self.state.context_length - 1)


def _slots_at(
    state: DecodeState, rows: DecodeRows, pages: torch.Tensor, positions: torch.Tensor, scratch_slot: int
) -> torch.Tensor:
    """Where entries of positions [S, n] are written; padding and what is beyond the context go to the scratch slot."""
    slots = _slots_of(state, pages, positions)
    is_padding = (rows.write == state.scratch_row)[:, None]
    return torch.where(is_padding | (positions >= state.context_length), scratch_slot, slots)


def _slots_of(state: DecodeState, pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Slots of positions [S, n] within the context."""
    index = (positions // state.page_size).clamp(max=pages.shape[1] - 1)
    return pages.gather(1, index) * state.page_size + positions % state.page_size


def _tokens_at(state: DecodeState, rows: DecodeRows, positions: torch.Tensor) -> torch.Tensor:
    """Known tokens at positions [S, n]."""
    index = rows.read[:, None] * state.width + positions
    return state.tokens.view(-1).index_select(0, index.view(-1)).view(positions.shape)
