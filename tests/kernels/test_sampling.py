"""Sampling distributions against float64 arithmetic written out, and draws against the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nextn.kernels.penalties import apply_penalties
from nextn.kernels.random_uniform import ACCEPT_STREAM, DRAFT_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.kernels.sampling_probs import sampling_probs
from scipy import stats


def expected_probs(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row in float64, by the definitions: sort, keep, renormalise."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    probs = np.exp(logits / temperature - np.max(logits / temperature))
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if top_k:
        for i in order[top_k:]:
            probs[i] = 0
        probs /= probs.sum()
    if top_p < 1:
        mass = 0.0
        for i in order:
            if mass >= top_p and i != order[0]:
                probs[i] = 0
            mass += probs[i]
        probs /= probs.sum()
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("seed", range(20))
def test_a_mixed_batch_gets_each_rows_own_distribution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows, vocab = 6, 37
    logits = rng.normal(size=(num_rows, vocab)) * 3
    temperature = rng.choice([0.0, 0.3, 1.0, 2.0], num_rows)
    top_k = rng.choice([0, 1, 5, 37, 100], num_rows)
    top_p = rng.choice([1.0, 0.9, 0.31, 0.001], num_rows)
    min_p = rng.choice([0.0, 0.05, 0.5], num_rows)
    found = sampling_probs(
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(temperature, dtype=torch.float32),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float32),
        torch.tensor(min_p, dtype=torch.float32),
    )
    for row in range(num_rows):
        expected = expected_probs(logits[row], temperature[row], int(top_k[row]), top_p[row], min_p[row])
        np.testing.assert_allclose(found[row].numpy(), expected, atol=2e-6)  # float32 sums of 37 terms


def test_draws_follow_the_distribution_and_never_hit_a_zero() -> None:
    probs = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    num = 50_000
    uniform = random_uniform(torch.tensor([3]), torch.arange(num)[None], DRAFT_STREAM)[0]
    counts = torch.bincount(sample_tokens(probs.expand(num, 6), uniform), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    assert stats.chisquare(counts[[1, 3, 4]].numpy(), np.array([0.1, 0.6, 0.3]) * num).pvalue > 1e-4


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 2)
    assert sample_tokens(probs, torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_random_numbers_are_uniform_and_independent_between_keys() -> None:
    by_position = random_uniform(torch.tensor([1]), torch.arange(20_000)[None], DRAFT_STREAM)[0].numpy()
    by_seed = random_uniform(torch.arange(20_000), torch.full((20_000,), 7), DRAFT_STREAM).numpy()
    other_stream = random_uniform(torch.tensor([1]), torch.arange(20_000)[None], ACCEPT_STREAM)[0].numpy()
    for numbers in (by_position, by_seed, other_stream):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03  # about 4 standard errors
    assert abs(np.corrcoef(by_position, other_stream)[0, 1]) < 0.03
    assert by_position.min() >= 0
    assert by_position.max() < 1


def test_random_numbers_do_not_depend_on_the_batch() -> None:
    seeds, positions = torch.tensor([5, -9, 2**62]), torch.tensor([0, 100, 7])
    together = random_uniform(seeds, positions, ACCEPT_STREAM)
    alone = [random_uniform(seeds[i : i + 1], positions[i : i + 1], ACCEPT_STREAM).item() for i in range(3)]
    assert together.tolist() == alone


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5, -0.5]] * 2)
    in_prompt = torch.tensor([True, True, False, False, False])
    output_counts = torch.tensor([[0, 1, 2, 0, 0], [0, 0, 0, 0, 3]])
    found = apply_penalties(logits, in_prompt, output_counts, repetition=2.0, presence=0.25, frequency=0.1)
    expected = [
        [1.0 / 2, -1.0 * 2 - 0.25 - 0.1, 2.0 / 2 - 0.25 - 0.2, 0.5, -0.5],
        [1.0 / 2, -1.0 * 2, 2.0, 0.5, -0.5 * 2 - 0.25 - 0.3],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
