"""Requests that the engine makes of itself before the first user comes. They count nowhere."""

from __future__ import annotations

from nextn.execution.step import run_step
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.scheduler import Scheduler
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.policy import TRIES_AT_FIRST, DraftLengthPolicy

WARM_UP_TOKENS = 8


def rehearse(
    scheduler: Scheduler,
    cycle: SpeculativeCycle,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    policy: DraftLengthPolicy | None = None,
    num_drafts: int | None = None,
    ignore_eos: bool = False,
) -> list[tuple[int, int]]:
    """Decode the prompts greedily, and leave scheduler and prefix cache as they were.

    prompts: each fits the context together with max_new_tokens
    policy, num_drafts: see ``run_step``
    Returns (drafted, accepted) of every step that drafted.
    """
    sampling = TokenSampling(max_new_tokens=max_new_tokens, seed=0, temperature=0.0, ignore_eos=ignore_eos)
    for i, ids in enumerate(prompts):
        scheduler.add(AddRequest(rid=f"rehearsal-{i}", input_ids=ids, sampling=sampling))
    outcomes: list[tuple[int, int]] = []
    while scheduler.has_work:
        steps = run_step(scheduler, cycle, policy, num_drafts)
        outcomes += [(s.extend.num_drafts, s.decision.num_accepted) for s in steps if s.extend.num_drafts]
    scheduler.pages.flush()
    scheduler.num_preemptions = 0
    return outcomes


def warm_up(
    scheduler: Scheduler,
    cycle: SpeculativeCycle,
    policy: DraftLengthPolicy | None,
    *,
    vocab_size: int,
    page_size: int,
    context_length: int,
) -> None:
    """Run a short request through every part, so that the first user does not pay for lazy initialisation.

    It is as long as the policy needs to time every number of drafts, were all of them accepted.
    """
    wanted = WARM_UP_TOKENS
    if policy is not None:
        wanted = TRIES_AT_FIRST * (policy.max_drafts + 1) * (policy.max_drafts + 2)
    max_new_tokens = min(wanted, context_length - page_size)
    if max_new_tokens > 0:
        prompt = [i % vocab_size for i in range(page_size)]
        rehearse(scheduler, cycle, [prompt], max_new_tokens=max_new_tokens, policy=policy, ignore_eos=True)
