"""One step of scheduler, policy and model: what is computed, what becomes of it, and what it taught."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nextn.execution.decode_runner import DecidedTokens, DecodeRunner, Masks
from nextn.protocol.ranks import DecodeBatch
from nextn.scheduler.scheduler import Decision, Extend, Scheduler
from nextn.scheduler.sequence import Sequence, Status
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.decode_state import MAX_BIASES, MAX_STOP_IDS, SlotMirror
from nextn.speculative.grammar import Grammars
from nextn.speculative.logits import Row
from nextn.speculative.policy import DraftLengthPolicy


class Progress(NamedTuple):
    """What a step brought one sequence.

    kept: the tokens decided, up to the one that ended the request
    is_first: none was decided before
    """

    extend: Extend
    decision: Decision
    kept: list[int]
    is_first: bool


@dataclass(frozen=True)
class _Launched:
    """A decode step under way. wanted: drafts asked for, by sequence; started: seconds, as perf_counter."""

    seqs: list[Sequence]
    wanted: list[int]
    num_drafts: int
    tokens: DecidedTokens
    started: float


class Stepper:
    """Runs steps over everything that can run.

    Where there is a decode runner, sequences that only decode go to it, and the rest of the step is computed behind
    them. Where there is no rest and overlap is on, the next step is launched before the tokens of the last are looked
    at; a sequence that has ended meanwhile is computed once more for nothing. The device works in the order of
    launches, so whoever gets its pages writes them later.

    Where a grammar says what may come next, the tokens so far have to be known: a sequence that has one keeps the
    next step from being launched ahead, and the runner masks only the row that follows these tokens. What a greedy
    sequence decides behind drafts is right all the same, up to the first token that the grammar forbids: if the
    likeliest token may come, it is the likeliest of those that may. The rest is dropped. Sequences that sample do
    not draft there, nor do those with penalties, whose counts the device would have to be told anew.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cycle: SpeculativeCycle,
        policy: DraftLengthPolicy | None,
        runner: DecodeRunner | None,
        grammars: Grammars,
        *,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.policy = policy
        self._cycle = cycle
        self._runner = runner
        self._grammars = grammars
        self._overlap = overlap
        self._mirror = SlotMirror()
        self._launched: _Launched | None = None
        self._set_back: set[int] = set()
        self._last_end = 0.0

    def step(self, num_drafts: int | None = None) -> list[Progress]:
        """Run one step, or read what the last one decided while the next is under way.

        num_drafts: of every sequence that allows it; the policy then neither chooses nor hears of the step. None leaves
            it to the policy, or to the scheduler's config where there is none
        """
        policy = self.policy if num_drafts is None else None
        launched, self._launched = self._launched, None
        if launched is not None and any(seq.status is Status.RUNNING for seq in launched.seqs):
            if self._overlap:
                self._launched = self._follow(launched, policy, num_drafts)
            return self._read(launched, policy)
        chosen = self._choose(policy, num_drafts)
        extends = self.scheduler.schedule(chosen)
        launched = self._launch(extends, chosen)
        if launched is None:
            return self._run(extends, None, policy) if extends else []
        arrivals = {seq.arrival for seq in launched.seqs}
        rest = [extend for extend in extends if extend.seq.arrival not in arrivals]
        if rest:
            return self._run(rest, launched, policy)
        if self._overlap:
            self._launched = launched
            return []
        return self._read(launched, policy)

    def forget(self, *, is_waited_for: bool = True) -> None:
        """Give back what the device holds for decode steps. Nothing can be computed afterwards.

        is_waited_for: see ``DecodeRunner.forget``
        """
        self._launched = None
        if self._runner is not None:
            self._runner.forget(is_waited_for=is_waited_for)

    def _choose(self, policy: DraftLengthPolicy | None, num_drafts: int | None) -> int | None:
        if policy is None:
            return num_drafts
        decoding = [seq for seq in self.scheduler.running if seq.is_decoding]
        num_fixed = sum(seq.needs_fixed_drafts for seq in decoding)
        return policy.choose(
            len(decoding) or max(self.scheduler.num_expected, 1),
            has_fixed=num_fixed > 0,
            will_be_timed=num_fixed < len(decoding),
        )

    def _run(
        self, extends: list[Extend], launched: _Launched | None, policy: DraftLengthPolicy | None
    ) -> list[Progress]:
        """Compute extends of any kind, behind a decode step if one is under way, and wait for all."""
        started = time.perf_counter() if launched is None else launched.started
        decisions = self._cycle.run(extends)
        if launched is not None:
            more_extends, more_decisions = self._decided(launched)
            extends, decisions = extends + more_extends, decisions + more_decisions
        self._last_end = time.perf_counter()
        num_prompt_tokens = sum(e.num_tokens for e in extends if not (e.decides and e.seq.num_output))
        if policy is not None:
            # Where decode steps have a runner, one that was not for it says nothing about those that are.
            is_usual = self._runner is None or (num_prompt_tokens > 0 and launched is not None)
            _tell_time(policy, extends, decisions, self._last_end - started, num_prompt_tokens, is_usual=is_usual)
        return self._commit(extends, decisions, policy, num_prompt_tokens)

    def _launch(self, extends: list[Extend], chosen: int | None) -> _Launched | None:
        """Start a step of the decode runner over those sequences that it is for; None if there are none."""
        runner = self._runner
        if runner is None:
            return None
        seqs = [extend.seq for extend in extends if extend.seq.is_decoding and _is_served(extend.seq)]
        if any(self.scheduler.wanted_drafts(seq, chosen) for seq in seqs):
            seqs = [seq for seq in seqs if not self.scheduler.may_draft(seq) or _lag_of(seq) <= runner.reach]
        wanted = [self.scheduler.wanted_drafts(seq, chosen) for seq in seqs]
        if not seqs or not all(self._has_room(seq, len(seq.tokens) + max(wanted)) for seq in seqs):
            return None
        self._set_back.clear()
        return self._start(seqs, wanted, is_ahead=False)

    def _follow(
        self, launched: _Launched, policy: DraftLengthPolicy | None, num_drafts: int | None
    ) -> _Launched | None:
        """Start the next step of the same sequences while one is under way; None if that is not certain to be right."""
        scheduler = self.scheduler
        assert self._runner is not None, "something is under way"
        seqs = [seq for seq in launched.seqs if seq.status is Status.RUNNING]
        if scheduler.may_admit or len(seqs) != len(scheduler.running) or self._set_back:
            return None
        if any(_has_grammar(seq) for seq in seqs):
            return None
        if all(seq.max_new_tokens - seq.num_output <= 1 for seq in seqs):
            return None  # they all end with the step that is under way
        chosen = self._choose(policy, num_drafts)
        wanted = [scheduler.wanted_drafts(seq, chosen) for seq in seqs]
        for seq in seqs:
            # What is under way may add a chain and a token; the next step writes a chain behind them.
            if not self._has_room(seq, len(seq.tokens) + launched.num_drafts + 1 + max(wanted)):
                return None
            lag = 0 if launched.num_drafts else _lag_of(seq)
            if max(wanted) and lag + launched.num_drafts + 1 > self._runner.reach:
                return None
        return self._start(seqs, wanted, is_ahead=True)

    def _has_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether the context holds so many tokens of a sequence, and there are pages for them; then it has them."""
        return num_tokens <= self.scheduler.context_length and self.scheduler.pages.grow(seq, num_tokens)

    def _start(self, seqs: list[Sequence], wanted: list[int], *, is_ahead: bool) -> _Launched:
        assert self._runner is not None, "the caller has looked"
        patches = [self._mirror.patch(seq, self._runner.reach, is_ahead=is_ahead) for seq in seqs]
        batch = DecodeBatch(
            slots=[seq.slot for seq in seqs],
            wanted_drafts=wanted,
            num_drafts=max(wanted),
            is_greedy=all(map(_is_greedy, seqs)),
            patches=[patch for patch in patches if patch is not None],
        )
        self._cycle.leader.decode(batch)
        started = time.perf_counter()
        return _Launched(seqs, wanted, batch.num_drafts, self._runner.launch(batch, self._masks_of(seqs)), started)

    def _masks_of(self, seqs: list[Sequence]) -> Masks | None:
        held = [seq for seq in seqs if _has_grammar(seq)]
        allowed = self._grammars.allowed([Row(seq, []) for seq in held])
        return None if allowed is None else Masks([seq.slot for seq in held], allowed)

    def _read(self, launched: _Launched, policy: DraftLengthPolicy | None) -> list[Progress]:
        """Wait for a decode step and commit what it decided."""
        extends, decisions = self._decided(launched)
        now = time.perf_counter()
        seconds, self._last_end = now - max(launched.started, self._last_end), now
        if policy is not None:
            num_seqs, chosen = len(launched.seqs), _chosen(zip(launched.seqs, launched.wanted, strict=True))
            if chosen:
                policy.observe(num_seqs, max(chosen), seconds, has_fixed=len(chosen) < num_seqs)
        return self._commit(extends, decisions, policy, 0)

    def _decided(self, launched: _Launched) -> tuple[list[Extend], list[Decision]]:
        """Wait for a decode step. Returns what it was to the sequences that still run."""
        extends: list[Extend] = []
        decisions: list[Decision] = []
        for seq, wanted, tokens in zip(launched.seqs, launched.wanted, launched.tokens.read(), strict=True):
            if seq.status is not Status.RUNNING:
                continue
            num_drafts = max(min(wanted, seq.max_new_tokens - seq.num_output - 1), 0)
            extend = Extend(seq, seq.num_computed, 1, num_drafts, decides=True, wants_drafts=wanted > 0)
            can_draft = self.scheduler.may_draft(seq)
            made_entries = launched.num_drafts > 0 and seq.arrival not in self._set_back and can_draft
            done = extend.end if made_entries else seq.num_draft_computed
            kept = self._grammars.followed(seq, tokens) if _has_grammar(seq) else tokens
            if len(kept) < len(tokens):
                self._mirror.forget(seq)
            else:
                self._mirror.advance(seq, len(tokens))
            extends.append(extend)
            decisions.append(Decision(kept, len(kept) - 1, num_draft_computed=done))
        self._set_back.clear()
        return extends, decisions

    def _commit(
        self,
        extends: list[Extend],
        decisions: list[Decision],
        policy: DraftLengthPolicy | None,
        num_prompt_tokens: int,
    ) -> list[Progress]:
        progress = []
        for extend, decision in zip(extends, decisions, strict=True):
            seq = extend.seq
            is_first = seq.num_output == 0
            kept = self.scheduler.commit(extend, decision)
            if policy is not None and extend.num_drafts:
                # Drafts beyond the end of a request were accepted for nothing.
                policy.observe_acceptance(extend.num_drafts, len(kept) - 1)
            if self._runner is not None and seq.status is Status.RUNNING:
                self._look_back(seq, decision)
            progress.append(Progress(extend, decision, kept, is_first))
        if policy is not None:
            policy.observe_traffic(num_prompt_tokens, sum(len(one.kept) for one in progress))
        return progress

    def _look_back(self, seq: Sequence, decision: Decision) -> None:
        """After a commit: its pages may have been replaced by cached ones that have no entries of the draft layer.

        A step that is under way then makes its entries in the old pages, for nothing.
        """
        if self._launched is not None and seq.num_draft_computed < (decision.num_draft_computed or 0):
            self._set_back.add(seq.arrival)


def _is_served(seq: Sequence) -> bool:
    """Whether the decode runner gives the sequence all that it asks for."""
    request = seq.request
    return (
        request.num_top_logprobs is None
        and len(request.sampling.logit_bias) <= MAX_BIASES
        and len(seq.stop_ids) <= MAX_STOP_IDS
    )


def _is_greedy(seq: Sequence) -> bool:
    """Whether the sequence takes the likeliest tokens as the model gives them."""
    sampling = seq.request.sampling
    return sampling.is_greedy and not sampling.has_rules and not _has_grammar(seq)


def _has_grammar(seq: Sequence) -> bool:
    return seq.request.grammar is not None


def _lag_of(seq: Sequence) -> int:
    """How many tokens lack their entries of the draft layer."""
    return seq.num_computed - seq.num_draft_computed


def _tell_time(
    policy: DraftLengthPolicy,
    extends: list[Extend],
    decisions: list[Decision],
    seconds: float,
    num_prompt_tokens: int,
    *,
    is_usual: bool,
) -> None:
    """What the policy can learn from a step's length, if all sequences that decode did the same.

    Called before the scheduler takes the decisions in. is_usual: whether decode steps are computed in this way
    """
    decoding = [
        (extend, decision)
        for extend, decision in zip(extends, decisions, strict=True)
        if extend.decides and extend.seq.num_output
    ]
    chosen = _chosen((extend.seq, extend.num_drafts) for extend, _ in decoding)
    if decoding and not chosen:
        return
    has_fixed, num_drafts = len(chosen) < len(decoding), max(chosen, default=0)
    made_entries = any(
        # A step that drafts makes those of the chain before, too.
        extend.start - extend.seq.num_draft_computed > policy.max_drafts
        if num_drafts
        else decision.num_draft_computed != extend.seq.num_draft_computed
        for extend, decision in decoding
        if not extend.seq.needs_fixed_drafts
    )
    if len(set(chosen)) > 1 or made_entries:
        policy.observe_catching_up(len(decoding), seconds, num_prompt_tokens, has_fixed=has_fixed)
    elif is_usual:
        policy.observe(len(decoding), num_drafts, seconds, num_prompt_tokens, has_fixed=has_fixed)


def _chosen(drafts: Iterable[tuple[Sequence, int]]) -> list[int]:
    """Of those sequences that follow the policy. drafts: of each"""
    return [num_drafts for seq, num_drafts in drafts if not seq.needs_fixed_drafts]
