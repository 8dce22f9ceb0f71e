"""Requests that the engine makes of itself before the first user comes. They count nowhere."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch

from nextn.config.engine_config import EngineConfig
from nextn.errors import CheckpointError
from nextn.execution.step import Stepper
from nextn.protocol.draft_health import CanaryResult
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.speculative.canary import MAX_NEW_TOKENS, NUM_DRAFTS, canary_prompts, judge, skipped
from nextn.speculative.policy import TRIES_AT_FIRST

SCORED_TOKENS = 16
WARM_UP_TOKENS = 8
WARM_UP_LENGTHS = (1, 2, 3, 17, 40, 65, 130, 300, 700, 1024, 1100, 2100)
"""Prompts of these lengths have different configurations of kernels."""
WARM_UP_TAILS = (4, 17, 100)
"""So have this many new tokens behind a long prefix."""

logger = logging.getLogger(__name__)


def prepare(
    config: EngineConfig,
    stepper: Stepper,
    *,
    device: torch.device,
    max_prefill_tokens: int,
    max_drafts: int,
    vocab_size: int,
    context_length: int,
) -> CanaryResult:
    """All that is computed before the first user comes. If it fails, the recordings of decode steps are given back.

    max_drafts: 0 where nothing drafts
    Raises CheckpointError if a weight is NaN, or if the draft is sick and the operator wants no such server.
    """
    try:
        check_numbers(stepper, vocab_size=vocab_size, context_length=context_length)
        warm_up(stepper, vocab_size=vocab_size, page_size=config.page_size, context_length=context_length)
        if device.type == "cuda":
            warm_up_kernels(
                stepper, max_prefill_tokens=max_prefill_tokens, vocab_size=vocab_size, context_length=context_length
            )
        return run_canary(config, stepper, max_drafts=max_drafts, vocab_size=vocab_size, context_length=context_length)
    except BaseException:
        stepper.forget(is_waited_for=False)
        raise


def rehearse(
    stepper: Stepper,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    num_drafts: int | None = None,
    ignore_eos: bool = False,
    temperature: float = 0.0,
) -> list[tuple[int, int]]:
    """Decode the prompts, and leave scheduler and prefix cache as they were.

    prompts: each fits the context together with max_new_tokens
    num_drafts: see ``Stepper.step``
    Returns (drafted, accepted) of every step that drafted.
    """
    sampling = TokenSampling(max_new_tokens=max_new_tokens, seed=0, temperature=temperature, ignore_eos=ignore_eos)
    scheduler = stepper.scheduler
    for i, ids in enumerate(prompts):
        scheduler.add(AddRequest(rid=f"rehearsal-{i}", input_ids=ids, sampling=sampling))
    outcomes: list[tuple[int, int]] = []
    while scheduler.has_work:
        steps = stepper.step(num_drafts)
        outcomes += [(s.extend.num_drafts, s.decision.num_accepted) for s in steps if s.extend.num_drafts]
    scheduler.pages.flush()
    scheduler.num_preemptions = 0
    return outcomes


def check_numbers(stepper: Stepper, *, vocab_size: int, context_length: int) -> None:
    """Have a prompt scored: where a weight is NaN, or the computing type too narrow, every answer would be token 0.

    Raises CheckpointError if a logprob is no number.
    """
    sampling = TokenSampling(max_new_tokens=1, seed=0, temperature=0.0)
    ids = [i % vocab_size for i in range(min(SCORED_TOKENS, context_length - 1))]
    scheduler = stepper.scheduler
    seq = scheduler.add(AddRequest(rid="score", input_ids=ids, sampling=sampling, prompt_logprobs_start=0))
    while scheduler.has_work:
        stepper.step(0)
    scheduler.pages.flush()
    if not all(math.isfinite(known.logprob) for known in seq.prompt_logprobs or () if known.logprob is not None):
        raise CheckpointError(
            "the model computes NaN or infinite values for an ordinary prompt: a weight of its files is far "
            "too large, or --dtype float16 is too narrow for it; download the checkpoint again, or use --dtype bfloat16"
        )


def warm_up(stepper: Stepper, *, vocab_size: int, page_size: int, context_length: int) -> None:
    """Run a short request through every part, so that the first user does not pay for lazy initialisation.

    It is as long as the policy needs to time every number of drafts, were all of them accepted.
    """
    wanted, policy = WARM_UP_TOKENS, stepper.policy
    if policy is not None:
        wanted = TRIES_AT_FIRST * (policy.max_drafts + 1) * (policy.max_drafts + 2)
    max_new_tokens = min(wanted, context_length - page_size)
    if max_new_tokens > 0:
        prompt = [i % vocab_size for i in range(page_size)]
        rehearse(stepper, [prompt], max_new_tokens=max_new_tokens, ignore_eos=True)


def warm_up_kernels(stepper: Stepper, *, max_prefill_tokens: int, vocab_size: int, context_length: int) -> None:
    """Have the kernels of prompts of every kind of length compiled, before a user waits for it. For a GPU."""
    limit = context_length - WARM_UP_TOKENS
    longest = min(max_prefill_tokens, limit)
    lengths = [*(length for length in WARM_UP_LENGTHS if length < longest), longest]
    for length in [*lengths, *(longest + tail for tail in WARM_UP_TAILS if longest + tail <= limit)]:
        rehearse(stepper, [[i % vocab_size for i in range(length)]], max_new_tokens=2, num_drafts=0, ignore_eos=True)
    together = [[i % vocab_size] * (1 + 7 * i) for i in range(1, 20) if 1 + 7 * i < longest]
    rehearse(stepper, together, max_new_tokens=4, num_drafts=0, ignore_eos=True, temperature=1.0)


def run_canary(
    config: EngineConfig,
    stepper: Stepper,
    *,
    max_drafts: int,
    vocab_size: int,
    context_length: int,
) -> CanaryResult:
    """Try the draft on text that a working head drafts well, as ``--speculative-canary`` says, and log the verdict.

    max_drafts: 0 where nothing drafts
    Raises CheckpointError if the draft is sick and the operator wants no such server.
    """
    result = _try_draft(config, stepper, max_drafts, vocab_size, context_length)
    if result.verdict != "sick":
        logger.info("%s", result.message)
        return result
    if config.canary == "fail":
        raise CheckpointError(
            f"{result.message}. Serve it anyway with --speculative-canary warn, without the draft with "
            "--speculative-algorithm none, or see python -m nextn.doctor --deep"
        )
    logger.error("%s", result.message)
    return result


def _try_draft(
    config: EngineConfig,
    stepper: Stepper,
    max_drafts: int,
    vocab_size: int,
    context_length: int,
) -> CanaryResult:
    if config.canary == "off":
        return skipped("--speculative-canary off")
    if max_drafts == 0:
        return skipped("nothing drafts")
    if config.load_format == "dummy":
        return skipped("dummy weights draft nothing that could be accepted")
    started = time.monotonic()
    folder = Path(config.tokenizer_path or config.model_path)
    prompts = canary_prompts(folder)
    if not prompts:
        return skipped(f"{folder} has no tokenizer.json that can be read, so there is no text to try")
    longest = max(map(len, prompts)) + MAX_NEW_TOKENS
    if longest > context_length or max(map(max, prompts)) >= vocab_size:
        return skipped(f"its prompts need {longest} tokens of context and the tokenizer of this model")
    num_drafts = min(NUM_DRAFTS, max_drafts)
    outcomes = rehearse(stepper, prompts, max_new_tokens=MAX_NEW_TOKENS, num_drafts=num_drafts)
    return judge(outcomes, num_drafts, time.monotonic() - started)
