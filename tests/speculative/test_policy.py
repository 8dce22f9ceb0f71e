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
