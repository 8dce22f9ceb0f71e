"""The number of drafts that measurably pays."""

from __future__ import annotations

import random

import pytest
from nextn.speculative.policy import DraftLengthPolicy

MAX_DRAFTS = 5


def speeds(acceptance: float, draft_cost: float) -> list[float]:
    """Expected tokens per second of each fixed k, when a step costs 1 + k · draft_cost."""
    return [sum(acceptance**j for j in range(k + 1)) / (1 + k * draft_cost) for k in range(MAX_DRAFTS + 1)]


def simulate(policy: DraftLengthPolicy, acceptance: float, draft_cost: float, num_seqs: int, num_steps: int) -> float:
    """Tokens per second and sequence over num_steps, with 10 % noise on every step's length."""
    rng = random.Random(0)
    seconds, tokens = 0.0, 0
    for _ in range(num_steps):
        k = policy.choose(num_seqs)
        taken = (1 + k * draft_cost) * rng.uniform(0.9, 1.1)
        for _ in range(num_seqs):
            accepted = 0
            while accepted < k and rng.random() < acceptance:
                accepted += 1
            policy.observe_acceptance(k, accepted)
            tokens += accepted + 1
        policy.observe(num_seqs, k, taken)
        seconds += taken
    return tokens / seconds / num_seqs


@pytest.mark.parametrize("num_seqs", [1, 4, 16, 64])
@pytest.mark.parametrize(
    ("acceptance", "draft_cost"),
    [(0.0, 0.2), (0.05, 0.3), (0.9, 0.1), (0.95, 0.02), (0.6, 0.25), (0.99, 0.5)],
    ids=["garbage", "nearly garbage", "good", "good and cheap", "middling", "good and dear"],
)
def test_it_is_nearly_as_fast_as_the_best_fixed_number(num_seqs: int, acceptance: float, draft_cost: float) -> None:
    found = simulate(DraftLengthPolicy(MAX_DRAFTS), acceptance, draft_cost, num_seqs, 4000)
    assert found >= 0.97 * max(speeds(acceptance, draft_cost))


def test_it_notices_when_a_draft_turns_bad_and_when_it_turns_good_again() -> None:
    policy = DraftLengthPolicy(MAX_DRAFTS)
    for acceptance, expected in ((0.9, {3, 4, 5}), (0.0, {0}), (0.9, {3, 4, 5})):
        simulate(policy, acceptance, 0.1, 4, 3000)
        assert policy.best(4) in expected


def test_one_slow_step_does_not_change_its_mind() -> None:
    policy = DraftLengthPolicy(MAX_DRAFTS)
    simulate(policy, 0.9, 0.1, 1, 500)
    before = policy.best(1)
    policy.observe(1, before, 1000.0)
    simulate(policy, 0.9, 0.1, 1, 100)
    assert abs(policy.best(1) - before) <= 1


@pytest.mark.parametrize(("draft_cost", "expected"), [(1.2, {0}), (0.1, {3, 4, 5})])
@pytest.mark.parametrize("prompt_tokens", [(20, 60), (200, 400)], ids=["short", "long"])
def test_it_learns_from_steps_that_compute_prompts_too(
    draft_cost: float, expected: set[int], prompt_tokens: tuple[int, int]
) -> None:
    """Under load hardly a step only decodes. A prompt token takes a hundredth of what a plain decode step does."""
    rng = random.Random(0)
    policy = DraftLengthPolicy(MAX_DRAFTS)
    policy.observe(0, 0, 1.0, 16)  # a short prompt at first, most of whose time is that of starting
    policy.observe(0, 0, 5.12, 512)
    for step in range(1500):
        k = policy.choose(64)
        num_prompt_tokens = 0 if step % 20 == 0 else rng.randint(*prompt_tokens)
        for _ in range(64):
            accepted = 0
            while accepted < k and rng.random() < 0.9:
                accepted += 1
            policy.observe_acceptance(k, accepted)
        seconds = (1 + k * draft_cost) * rng.uniform(0.9, 1.1) + 0.01 * num_prompt_tokens
        policy.observe(64, k, seconds, num_prompt_tokens)
    assert policy.best(64) in expected


def test_prompts_alone_change_nothing_that_is_known_of_decoding() -> None:
    policy = DraftLengthPolicy(MAX_DRAFTS)
    simulate(policy, 0.9, 0.1, 4, 500)
    before = policy.best(4)
    for _ in range(50):
        policy.observe(0, 0, 1000.0, 512)
    assert policy.best(4) == before


@pytest.mark.parametrize(("num_prompt_tokens", "expected"), [(0, {3, 4, 5}), (1_000, {0})])
def test_the_draft_entries_of_prompts_count(num_prompt_tokens: int, expected: set[int]) -> None:
    """Drafting gains a third per step here; with 1,000 prompt tokens per generated one, their entries take far more."""
    policy = DraftLengthPolicy(MAX_DRAFTS)
    policy.observe(0, 0, 5.12, 512)
    simulate(policy, 0.9, 0.1, 4, 500)
    for _ in range(500):
        policy.observe_traffic(num_prompt_tokens, 1)
    assert policy.best(4) in expected
