"""The number of drafts that measurably pays."""

from __future__ import annotations

import itertools
import random
import time

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


def test_where_some_draft_a_number_of_their_own_the_others_are_judged_by_such_steps() -> None:
    """Alone, drafting does not pay; where a step computes many rows anyway it does."""
    policy = DraftLengthPolicy(MAX_DRAFTS)
    simulate(policy, 0.7, 0.9, 4, 500)
    for _ in range(1000):
        k = policy.choose(4, has_fixed=True)
        policy.observe(4, k, 1 + 0.05 * k, has_fixed=True)
    assert policy.best(4) == 0
    assert policy.best(4, has_fixed=True) > 2
    assert policy.choose(4, has_fixed=True) > 2


@pytest.mark.parametrize("is_known", [False, True], ids=["new", "known of another batch size"])
def test_what_cannot_be_timed_is_not_tried_for_ever(is_known: bool) -> None:
    policy = DraftLengthPolicy(MAX_DRAFTS)
    if is_known:
        simulate(policy, 0.9, 0.05, 4, 500)
    best = policy.best(16)
    chosen = [policy.choose(16) for _ in range(1000)]
    assert sum(k != best for k in chosen) < 150
    simulate(policy, 0.9, 0.05, 16, 1000)
    assert policy.best(16) in {3, 4, 5}


def test_what_a_similar_batch_teaches_later_counts_too() -> None:
    """A guess is not a snapshot."""
    policy = DraftLengthPolicy(MAX_DRAFTS)
    for draft_cost, expected in ((1.2, {0}), (0.05, {3, 4, 5})):
        for _ in range(200):
            for k in range(MAX_DRAFTS + 1):
                policy.observe(8, k, 1 + k * draft_cost)
        assert policy.best(16) in expected


def test_steps_that_make_the_draft_layer_ready_count_as_what_a_try_costs() -> None:
    gaps = []
    for catching_up in (0.0, 30.0):
        policy = DraftLengthPolicy(MAX_DRAFTS)
        simulate(policy, 0.0, 0.2, 64, 2000)
        tried: list[int] = []
        for step in range(6000):
            if k := policy.choose(64):
                tried.append(step)
                policy.observe_catching_up(64, 1.0 + catching_up + 2.0, num_prompt_tokens=0)
            policy.observe(64, k, 1 + 0.2 * k)
        gaps.append(max(b - a for a, b in itertools.pairwise(tried)))
    assert gaps[0] < 1000 < gaps[1]


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("what", ["contexts that grow", "steps that are held up"])
def test_what_changes_the_length_of_every_step_does_not_mislead_it(what: str, acceptance: float) -> None:
    """As fast as the best fixed number under the same conditions, but for 3 %."""

    def speed(policy: DraftLengthPolicy | None, k: int, num_steps: int = 1500) -> float:
        rng, luck = random.Random(1), random.Random(2)
        seconds, tokens = 0.0, 0
        for step in range(num_steps):
            k = k if policy is None else policy.choose(4)
            taken = 1 + 0.1 * k + (0.01 * (step % 200) if what == "contexts that grow" else 0)
            taken *= rng.uniform(0.95, 1.05) * (rng.uniform(1.5, 5) if rng.random() < 0.1 and "held" in what else 1)
            for _ in range(4):
                accepted = 0
                while accepted < k and luck.random() < acceptance:
                    accepted += 1
                tokens += accepted + 1
                if policy is not None:
                    policy.observe_acceptance(k, accepted)
            if policy is not None:
                policy.observe(4, k, taken)
            seconds += taken
        return tokens / seconds

    best = max(speed(None, k) for k in range(MAX_DRAFTS + 1))
    assert speed(DraftLengthPolicy(MAX_DRAFTS), 0) >= 0.97 * best


@pytest.mark.parametrize("costs", [(1.0, 0.05), (0.05, 1.0)], ids=["cheap", "dear"])
def test_it_notices_when_drafting_becomes(costs: tuple[float, float]) -> None:
    """What a number of drafts costs beside another may change by so much that most of it looks like a hold-up."""
    policy = DraftLengthPolicy(MAX_DRAFTS)
    for draft_cost in costs:
        simulate(policy, 0.8, draft_cost, 1, 10_000)
    found = simulate(policy, 0.8, costs[1], 1, 5_000)
    assert found >= 0.97 * max(speeds(0.8, costs[1]))


def test_what_holds_a_few_steps_up_is_not_taken_for_the_price_of_a_number() -> None:
    """The first tries of each number do not follow each other."""
    policy = DraftLengthPolicy(MAX_DRAFTS)
    for _ in range(2 * (MAX_DRAFTS + 1)):
        k = policy.choose(1)
        held_up = 4.0 if sum(policy._costs_at(1, False).num_seen) < 4 else 1.0
        policy.observe(1, k, (1 + 0.05 * k) * held_up)
        policy.observe_acceptance(k, k)
    assert policy.best(1) == MAX_DRAFTS


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


def test_batch_sizes_that_are_guessed_from_each_other_cost_no_time() -> None:
    """Of every batch but the first one k is known: two guesses for each of the others, level by level, are 2^21."""
    policy = DraftLengthPolicy(MAX_DRAFTS)
    for k in range(MAX_DRAFTS + 1):
        policy.observe(1, k, 0.01 + 0.001 * k)
    sizes = [2, 3, 4, *(size for octave in range(3, 12) for size in (5 << octave - 3, 7 << octave - 3))]
    for level, num_seqs in enumerate(sizes):
        policy.observe(num_seqs, level % (MAX_DRAFTS + 1), 0.01 * (level + 2))
    started = time.monotonic()
    assert policy.best(sizes[-1]) in range(MAX_DRAFTS + 1)
    assert time.monotonic() - started < 1
