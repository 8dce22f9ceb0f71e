"""Continuous batching: every step, each running sequence gets one extend; waiting ones join as memory allows.

There is no prefill phase and no decode phase (Yu et al., 2022, "Orca"; Agrawal et al., 2023, "Sarathi"): a prompt chunk
is an extend by many tokens, a decode step an extend by one known token and k drafts.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass
from typing import NamedTuple

from nextn.protocol.messages import AddRequest, TokenLogprobs
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.prefix_cache import CacheNode
from nextn.scheduler.sequence import Sequence, Status

MAX_LAG = 16
"""A sequence whose draft entries are further behind catches up first, in a step of its own."""


@dataclass(frozen=True)
class SchedulerConfig:
    """max_prefill_tokens: most prompt tokens computed in one step; 0 is no bound
    num_drafts: drafts per verify step; a step may be given fewer (or more) for the sequences that allow it
    by_priority: larger ``priority`` first, else first come, first served
    drafts_under_grammar: whether all sequences that a grammar holds draft; else those that take the likeliest tokens as
        the model gives them
    """

    max_running: int
    max_queued: int
    max_prefill_tokens: int
    context_length: int
    num_drafts: int
    by_priority: bool
    eos_token_ids: tuple[int, ...]
    drafts_under_grammar: bool = True


class Extend(NamedTuple):
    """What one sequence computes in a step: tokens[start : start + num_tokens], then ``num_drafts`` drafts.

    decides: the rows from the last known token on choose new tokens
    wants_drafts: whether drafts are made for the sequence at all these days, so that the draft layer should keep up
    """

    seq: Sequence
    start: int
    num_tokens: int
    num_drafts: int
    decides: bool
    wants_drafts: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class Decision(NamedTuple):
    """What the model decided for one extend: accepted drafts and one more token; empty for a partial prompt chunk.

    num_draft_computed: see Sequence; None without a draft
    """

    tokens: list[int]
    num_accepted: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_draft_computed: int | None = None


class _Refused(NamedTuple):
    """The sequence for which there was no memory when it was last tried, with what was cached of it and how many pages
    it needs beside."""

    arrival: int
    prefix: list[CacheNode]
    missing: int


class Scheduler:
    """Owns all sequences from arrival to their end."""

    def __init__(self, config: SchedulerConfig, pages: KVPages) -> None:
        self._config = config
        self.pages = pages
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._by_rid: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._num_arrived = 0
        self._refused: _Refused | None = None
        self.num_preemptions = 0

    def __contains__(self, rid: str) -> bool:
        return rid in self._by_rid

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_decoding(self) -> int:
        """Running sequences whose next step decides a token over a computed context."""
        return sum(seq.is_decoding for seq in self.running)

    @property
    def num_expected(self) -> int:
        """Sequences that will decode once their prompts are computed, if there is memory for all."""
        return len(self.running) + min(len(self.waiting), len(self._free_slots))

    @property
    def num_pages_wanted(self) -> int:
        """Pages that the next step may ask for, at most."""
        chunk = self._config.max_prefill_tokens or self._config.context_length
        waiting = len(self.waiting[0].tokens) + 1 if self.waiting else 0
        return self.pages.pages_for(chunk) + self.pages.pages_for(waiting) + 2 * len(self.running)

    @property
    def may_admit(self) -> bool:
        """Whether the next ``schedule`` might take a waiting sequence in."""
        return bool(self.waiting and self._free_slots) and not self._is_refused(self.waiting[0])

    @property
    def context_length(self) -> int:
        return self._config.context_length

    @property
    def is_full(self) -> bool:
        """Whether as many requests run and wait as may; some that wait may be about to run."""
        return len(self._by_rid) >= self._config.max_running + self._config.max_queued

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    def add(self, request: AddRequest) -> Sequence:
        """Queue a request. The caller has checked that it fits and that the queue is not full."""
        sampling = request.sampling
        eos = () if sampling.ignore_eos else self._config.eos_token_ids
        seq = Sequence(
            request=request,
            arrival=self._num_arrived,
            arrival_time=time.monotonic(),
            max_new_tokens=min(sampling.max_new_tokens, self._config.context_length - len(request.input_ids)),
            stop_ids=frozenset((*eos, *sampling.stop_token_ids)),
        )
        self._num_arrived += 1
        self._by_rid[request.rid] = seq
        insort(self.waiting, seq, key=self._rank)
        return seq

    def _rank(self, seq: Sequence) -> tuple[int, int]:
        """Smaller runs first and is preempted last."""
        return (-seq.request.priority if self._config.by_priority else 0, seq.arrival)

    def schedule(self, num_drafts: int | None = None) -> list[Extend]:
        """Choose the next step's extends and give each the pages it needs, preempting the last in rank if need be.

        num_drafts: drafts of sequences whose output does not depend on that number; None is the config's
        """
        extends: list[Extend] = []
        budget = self._config.max_prefill_tokens or 1 << 60
        preempted = False
        for seq in sorted(self.running, key=self._rank):
            if seq.status is Status.RUNNING and not seq.is_decoding and not preempted:
                # Those that wait and rank before it go first.
                admitted = self._admit(budget, num_drafts, before=seq)
                extends += admitted
                budget -= sum(extend.num_tokens for extend in admitted)
            extend = self._plan(seq, budget, num_drafts) if seq.status is Status.RUNNING else None
            while extend is not None and not self._make_room(extend):
                # The last in rank stands at or after seq in this loop, so nothing planned so far is lost.
                victim = max(self.running, key=self._rank)
                self._preempt(victim)
                preempted = True
                extend = None if victim is seq else extend
            if extend is not None:
                extends.append(extend)
                budget -= 0 if seq.is_decoding else extend.num_tokens
        return extends if preempted else extends + self._admit(budget, num_drafts)

    def wanted_drafts(self, seq: Sequence, num_drafts: int | None) -> int:
        """Drafts of a sequence in a step of ``num_drafts`` (see ``schedule``), were there no end to its tokens."""
        if not self.may_draft(seq):
            return 0
        return self._config.num_drafts if num_drafts is None or seq.needs_fixed_drafts else num_drafts

    def may_draft(self, seq: Sequence) -> bool:
        """Whether its drafts can be held to what it asks for."""
        sampling = seq.request.sampling
        is_plain = sampling.is_greedy and not sampling.has_rules
        return seq.request.grammar is None or self._config.drafts_under_grammar or is_plain

    def _plan(self, seq: Sequence, budget: int, num_drafts: int | None = None) -> Extend | None:
        wanted = self.wanted_drafts(seq, num_drafts)
        if seq.is_decoding:
            can_draft = seq.needs_fixed_drafts or seq.num_computed - seq.num_draft_computed <= MAX_LAG
            drafts = max(min(wanted, seq.max_new_tokens - seq.num_output - 1), 0) if can_draft else 0
            return Extend(seq, seq.num_computed, 1, drafts, decides=True, wants_drafts=wanted > 0)
        num_tokens = min(budget, seq.compute_target - seq.num_computed)
        if num_tokens <= 0:
            return None
        decides = seq.num_output == 0 and seq.num_computed + num_tokens == len(seq.tokens)
        return Extend(seq, seq.num_computed, num_tokens, 0, decides, wants_drafts=wanted > 0)

    def _make_room(self, extend: Extend) -> bool:
        """Pages for the tokens to compute and the drafts."""
        return self.pages.grow(extend.seq, extend.end + extend.num_drafts)

    def _admit(self, budget: int, num_drafts: int | None, before: Sequence | None = None) -> list[Extend]:
        """before: only those that rank before this one"""
        admitted: list[Extend] = []
        while self.may_admit and budget > 0:
            seq = self.waiting[0]
            if before is not None and self._rank(seq) > self._rank(before):
                break
            self.pages.attach_prefix(seq, self._max_prefix(seq))
            extend = self._plan(seq, budget, num_drafts)
            missing = self.pages.pages_for(len(seq.tokens) + 1) - len(seq.pages)
            if extend is None or missing > self.pages.num_available or not self._make_room(extend):
                self._refused = _Refused(seq.arrival, seq.nodes, missing)
                self.pages.release(seq)
                break
            self._refused = None
            self.waiting.pop(0)
            seq.status = Status.RUNNING
            seq.slot = self._free_slots.pop()
            if seq.cached_tokens is None:
                seq.cached_tokens = seq.num_computed
                seq.first_scheduled_time = time.monotonic()
            self.running.append(seq)
            admitted.append(extend)
            budget -= extend.num_tokens
        return admitted

    def _is_refused(self, seq: Sequence) -> bool:
        """Whether there was no memory for the sequence, and still is none, nor more of it cached."""
        last = self._refused
        if last is None or last.arrival != seq.arrival or not self.running:
            return False
        if self.pages.cache.has_next(last.prefix, seq.tokens, seq.request.cache_salt):
            return False
        num_available = self.pages.num_available
        if num_available >= last.missing:  # pages of its own prefix are no room for the rest
            num_available -= sum(node.ref_count == 0 for node in last.prefix)
        return num_available < last.missing

    def _max_prefix(self, seq: Sequence) -> int:
        """At least one token must be computed, and every prompt position whose logprob is wanted and not yet known."""
        limit = seq.compute_target - 1
        start = seq.request.prompt_logprobs_start
        if start is not None and seq.num_output == 0 and seq.prompt_logprobs is not None:
            limit = min(limit, max(start + len(seq.prompt_logprobs) - 1, 0))
        return limit

    def _preempt(self, seq: Sequence) -> None:
        """Take a running sequence's pages; it waits again and is recomputed, mostly from the prefix cache."""
        self._stop_running(seq)
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=self._rank)
        self.num_preemptions += 1

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_slots.append(seq.slot)
        seq.slot = -1
        self.pages.release(seq)

    def commit(self, extend: Extend, decision: Decision) -> list[int]:
        """Record what a step computed and decided; ends the sequence if a decided token does. Returns tokens kept."""
        seq = extend.seq
        if decision.prompt_logprobs and seq.prompt_logprobs is not None:
            seq.prompt_logprobs.extend(decision.prompt_logprobs)
        kept = seq.append(decision.tokens)
        seq.num_computed = extend.end if not extend.decides else len(seq.tokens) - 1
        done = decision.num_draft_computed
        seq.num_draft_computed = seq.num_computed if done is None else done
        if extend.decides:
            seq.num_verify_passes += 1
            seq.num_drafted += extend.num_drafts
            seq.num_accepted += min(decision.num_accepted, len(kept))
        elif seq.num_output == 0:
            seq.is_chunked = True
        self.pages.publish(seq)
        if seq.finish_reason is not None:
            self.finish(seq)
        return kept

    def finish(self, seq: Sequence) -> None:
        """Release everything a sequence holds, wherever it stands. Called exactly once per sequence."""
        assert seq.status is not Status.FINISHED, f"request {seq.request.rid} ended twice"
        if seq.status is Status.RUNNING:
            self._stop_running(seq)
        else:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        del self._by_rid[seq.request.rid]

    def abort(self, rid: str) -> Sequence | None:
        """End a request now; None if it is not here (any more)."""
        seq = self._by_rid.get(rid)
        if seq is not None:
            seq.finish_reason = "abort"
            self.finish(seq)
        return seq

    def check(self) -> None:
        """Assert the invariants of pages, slots and queues."""
        self.pages.check(self.sequences)
        assert all(not seq.pages and seq.slot == -1 for seq in self.waiting), "a waiting sequence holds resources"
        slots = [seq.slot for seq in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._config.max_running)), "a slot is lost or shared"
        assert set(self._by_rid.values()) == set(self.sequences)
