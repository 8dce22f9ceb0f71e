"""One decode step over tensors alone: draft k tokens, verify them, accept, and set up the next step.

It is ``cycle.py``'s step for sequences that only decode, written so that nothing of it waits for the CPU: shapes depend
on the number of sequences and of drafts alone, and what the next step starts from stays in ``DecodeState``. So it can
be recorded as a CUDA graph, and launched before the tokens of the step before are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.argmax import argmax
from nextn.kernels.commit_tokens import commit_tokens
from nextn.kernels.paged_attention import AttentionLayout
from nextn.kernels.penalties import adjust_logits_by_slot
from nextn.kernels.random_uniform import DRAFT_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.kernels.sampling_probs import sampling_probs
from nextn.kernels.step_layout import StepLayout, lay_out_step, rules_of_rows
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

    @torch.inference_mode()
    def run(self, rows: DecodeRows, num_drafts: int, *, is_greedy: bool) -> torch.Tensor:
        """Advance every sequence by 1 … num_drafts + 1 tokens.

        is_greedy: whether all sequences take the likeliest tokens as the model gives them
        Returns [S, num_drafts + 1] int64: the accepted drafts, the token after them, then NO_TOKEN.
        """
        state = self._state
        layout = self._lay_out(rows, num_drafts)
        choice = _Choice(state, rows.read, layout.num_tokens, layout.seeds, is_greedy)

        draft_probs = self._draft(layout, num_drafts, choice)
        hidden = self._target.forward(layout.ids.view(-1), self._verify_batch(layout), self._kv_cache)
        if self._proposer is not None:
            self._proposer.store_hidden(layout.slots.view(-1), hidden)
        logits = self._target.compute_logits(hidden)

        draft_tokens = layout.ids[:, 1:].masked_fill(layout.is_beyond, NO_TOKEN)
        _, tokens = self._accept(choice, logits, draft_tokens, draft_probs)
        decided = self._tp.broadcast(tokens)
        output_counts = None if is_greedy else state.rules.output_counts
        commit_tokens(decided, layout.num_tokens[0], rows.write, state.tokens, state.num_tokens, output_counts)
        return decided

    def _draft(self, layout: StepLayout, num_drafts: int, choice: _Choice) -> torch.Tensor | None:
        """Write drafts behind the roots in layout.ids.

        Returns the probabilities that they were drawn from, [S, num_drafts, V]; None if all are greedy.
        """
        if num_drafts == 0:
            return None
        assert self._proposer is not None, "drafts are asked for only where there is a draft model"
        probs = None if choice.is_greedy else choice.new_probs(num_drafts, self._target.config.vocab_size)
        ids, hidden = layout.known_ids, self._proposer.hidden_at(layout.known_sources)
        for step in range(num_drafts):
            hidden = self._proposer.draft.forward(ids, hidden, self._draft_batch(layout, step), self._kv_cache)
            logits = self._proposer.draft.compute_logits(hidden)
            chosen = choice.draft(logits, layout.ids[:, 1:], step, None if probs is None else probs[step])
            ids = self._tp.broadcast(chosen)
            layout.ids[:, step + 1] = ids
        return None if probs is None else probs.transpose(0, 1)

    def _accept(
        self, choice: _Choice, logits: torch.Tensor, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: [S · (k + 1), V]; draft_tokens: [S, k], NO_TOKEN beyond a chain's end; draft_probs: [S, k, V]

        Returns the number of accepted drafts [S], and these with the token after them, then NO_TOKEN, [S, k + 1].
        """
        return choice.verify(logits, draft_tokens, draft_probs)

    def _lay_out(self, rows: DecodeRows, num_drafts: int) -> StepLayout:
        """The last reach + 1 known tokens may lack entries of the draft layer, whatever the last steps drafted."""
        state = self._state
        return lay_out_step(
            rows.read,
            rows.write,
            rows.wanted_drafts,
            state.tokens,
            state.num_tokens,
            state.token_limit,
            state.seed,
            state.page_table,
            num_drafts=num_drafts,
            num_known=state.reach + 1 if num_drafts else 0,
            page_size=state.page_size,
            context_length=state.context_length,
            scratch_page=state.scratch_page,
        )

    def _verify_batch(self, layout: StepLayout) -> ExtendBatch:
        """Every sequence's root and drafts."""
        starts, width = layout.draft_positions[0], layout.ids.shape[1]
        pages, page_size = layout.page_table, self._state.page_size
        attention = AttentionLayout(starts, layout.cu_seqlens_q, pages, page_size, 0, width)
        return ExtendBatch(layout.positions.view(-1), layout.slots.view(-1), attention)

    def _draft_batch(self, layout: StepLayout, step: int) -> ExtendBatch:
        """The token before the draft of a step; in the first, after the known tokens that lack entries."""
        positions, pages, page_size = layout.draft_positions[step], layout.page_table, self._state.page_size
        attention = AttentionLayout(positions, layout.draft_cu_seqlens_q, pages, page_size, FIRST_KEY, 1)
        if step == 0:
            return ExtendBatch(layout.known_positions, layout.known_slots, attention, layout.known_roots)
        return ExtendBatch(positions, layout.draft_slots[step], attention)


@dataclass(frozen=True)
class _Choice:
    """How the sequences choose their tokens.

    slots, seeds: [S] int64; num_tokens: [k + 1, S] int64, with the first 0 … k drafts
    """

    state: DecodeState
    slots: torch.Tensor
    num_tokens: torch.Tensor
    seeds: torch.Tensor
    is_greedy: bool

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
        sampling_probs(self._adjusted(logits, draft_tokens, step), *self._draft_rules, out=probs)
        return sample_tokens(probs, random_uniform(self.seeds, self.num_tokens[step], DRAFT_STREAM))

    def verify(
        self, logits: torch.Tensor, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecodeStep._accept``."""
        num_seqs, num_drafts = draft_tokens.shape
        if self.is_greedy:
            return verify_greedy_chains(argmax(logits).view(num_seqs, -1), draft_tokens)
        probs = sampling_probs(self._adjusted(logits, draft_tokens, 0), *self._rules(num_drafts + 1))
        return verify_chains(
            probs.view(num_seqs, num_drafts + 1, -1), draft_probs, draft_tokens, self.seeds, self.num_tokens[0]
        )

    def _adjusted(self, logits: torch.Tensor, draft_tokens: torch.Tensor, num_before: int) -> torch.Tensor:
        """See ``adjust_logits_by_slot``; in place."""
        rules, num_tokens = self.state.rules, self.num_tokens[0]
        return adjust_logits_by_slot(
            logits, rules, self.slots, num_tokens, draft_tokens, num_before=num_before, out=logits
        )

    @cached_property
    def _draft_rules(self) -> tuple[torch.Tensor, ...]:
        """The same in every draft step."""
        return self._rules(1)

    def _rules(self, rows_per_seq: int) -> tuple[torch.Tensor, ...]:
        state = self.state
        return rules_of_rows(self.slots, rows_per_seq, state.temperature, state.top_k, state.top_p, state.min_p)
