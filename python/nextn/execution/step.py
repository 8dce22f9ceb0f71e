"""One step of scheduler, policy and cycle: what is computed, what becomes of it, and what it taught."""

from __future__ import annotations

import time
from typing import NamedTuple

from nextn.scheduler.scheduler import Decision, Extend, Scheduler
from nextn.speculative.cycle import SpeculativeCycle
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


def run_step(
    scheduler: Scheduler, cycle: SpeculativeCycle, policy: DraftLengthPolicy | None, num_drafts: int | None = None
) -> list[Progress]:
    """Run one cycle over everything that can run.

    policy: chooses the number of drafts, and hears of the step
    num_drafts: without a policy, the number of drafts; None is what the scheduler's config says
    """
    if policy is not None:
        num_decoding = scheduler.num_decoding
        num_drafts = policy.choose(max(num_decoding, 1), will_be_timed=num_decoding > 0)
    extends = scheduler.schedule(num_drafts)
    if not extends:
        return []
    started = time.perf_counter()
    decisions = cycle.run(extends)
    num_prompt_tokens = sum(extend.num_tokens for extend in extends if not (extend.decides and extend.seq.num_output))
    if policy is not None:
        _tell_time(policy, extends, decisions, time.perf_counter() - started, num_prompt_tokens)
    progress = []
    for extend, decision in zip(extends, decisions, strict=True):
        is_first = extend.seq.num_output == 0
        kept = scheduler.commit(extend, decision)
        if policy is not None and extend.num_drafts:
            # Drafts beyond the end of a request were accepted for nothing.
            policy.observe_acceptance(extend.num_drafts, len(kept) - 1)
        progress.append(Progress(extend, decision, kept, is_first))
    if policy is not None:
        policy.observe_traffic(num_prompt_tokens, sum(len(one.kept) for one in progress))
    return progress


def _tell_time(
    policy: DraftLengthPolicy,
    extends: list[Extend],
    decisions: list[Decision],
    seconds: float,
    num_prompt_tokens: int,
) -> None:
    """What the policy can learn from a step's length, if all sequences that decode did the same.

    Called before the scheduler takes the decisions in.
    """
    decoding = [extend for extend in extends if extend.decides and extend.seq.num_output]
    num_drafts = decoding[0].num_drafts if decoding else 0
    if any(extend.num_drafts != num_drafts for extend in decoding):
        return
    lags = any(
        extend.decides and extend.seq.num_output and decision.num_draft_computed != extend.seq.num_draft_computed
        for extend, decision in zip(extends, decisions, strict=True)
    )
    if num_drafts or not lags:
        policy.observe(len(decoding), num_drafts, seconds, num_prompt_tokens)
    elif not num_prompt_tokens:
        policy.observe_catching_up(len(decoding), seconds)
