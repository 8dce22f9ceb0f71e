"""The acceptance rules: exact for greedy, exact in distribution for sampling."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from nextn.kernels.random_uniform import ACCEPT_STREAM, DRAFT_STREAM, FINAL_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.speculative.acceptance import verify_greedy, verify_sampled
from scipy import stats


def test_greedy_keeps_drafts_up_to_the_first_difference() -> None:
    chains = [[1, 2, 3], [1, 9, 3], [9, 2, 3], [1], []]
    num_accepted, final = verify_greedy([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 7], chains)
    assert num_accepted == [3, 1, 0, 1, 0]
    assert final == [4, 2, 1, 2, 7]


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="the chains need 4 target rows, found 3"):
        verify_greedy([0, 0, 0], [[0, 0, 0]])
    with pytest.raises(ValueError, match="3 drafts need 4 target rows, found 3"):
        verify_sampled(
            torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64), *torch.rand(2, 1, 4)
        )


def markov(seed: int, vocab: int) -> torch.Tensor:
    """A random transition table [vocab, vocab] with some zero entries."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.softmax(torch.randn(vocab, vocab, generator=generator) * 1.5, dim=-1)
    table[torch.rand(vocab, vocab, generator=generator) < 0.2] = 0
    table[:, 0] += 0.05
    return table / table.sum(-1, keepdim=True)


def speculate(target: torch.Tensor, draft: torch.Tensor, num_drafts: int, num: int) -> torch.Tensor:
    """``num`` independent runs of three tokens from token 0, each a seed of its own; returns [num, 3] tokens."""
    vocab = target.shape[0]
    seeds = torch.arange(num)
    sequences = torch.zeros(num, 1 + 3 + num_drafts + 1, dtype=torch.int64)
    length = torch.ones(num, dtype=torch.int64)
    while int(length.min()) < 4:
        rows = (length < 4).nonzero()[:, 0]
        n = len(rows)
        root = sequences[rows, length[rows] - 1]
        tokens, chain, chain_probs = root, [], []
        for j in range(num_drafts):
            probs = draft[tokens]
            tokens = sample_tokens(probs, random_uniform(seeds[rows], length[rows] + j, DRAFT_STREAM))
            chain.append(tokens)
            chain_probs.append(probs)
        drafts = torch.stack(chain, 1) if chain else torch.zeros(n, 0, dtype=torch.int64)
        q = torch.stack(chain_probs, 1) if chain else torch.zeros(n, 0, vocab)
        positions = length[rows, None] + torch.arange(num_drafts + 1)
        num_accepted, final = verify_sampled(
            target[torch.cat([root[:, None], drafts], 1)],
            q,
            drafts,
            random_uniform(seeds[rows], positions[:, :num_drafts], ACCEPT_STREAM),
            random_uniform(seeds[rows], positions, FINAL_STREAM),
        )
        for j in range(num_drafts):
            sequences[rows, length[rows] + j] = drafts[:, j]
        sequences[rows, length[rows] + num_accepted] = final
        length[rows] += num_accepted + 1
    return sequences[:, 1:4]


def exact_distribution(target: torch.Tensor) -> np.ndarray:
    """The probability of each of the V³ three-token continuations of token 0."""
    t = target.double()
    return (t[0][:, None, None] * t[:, :, None] * t[None]).flatten().numpy()


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_sampled_sequences_have_the_targets_joint_distribution(num_drafts: int) -> None:
    target, draft = markov(1, 5), markov(2, 5)
    exact = exact_distribution(target)
    distances = []
    for num in (10, 100, 1_000, 10_000, 100_000):
        tokens = speculate(target, draft, num_drafts, num)
        counts = np.bincount((tokens[:, 0] * 25 + tokens[:, 1] * 5 + tokens[:, 2]).numpy(), minlength=125)
        distances.append(0.5 * np.abs(counts / num - exact).sum())
    assert counts[exact == 0].sum() == 0
    likely = exact * num > 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(exact[likely], exact[~likely].sum()) * num
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    # An unbiased sampler's distance falls as 1 / sqrt(samples): 100-fold from 10 to 100,000.
    assert all(later < earlier / 1.8 for earlier, later in pairwise(distances[1:]))
    assert distances[-1] < 0.02


def test_a_perfect_draft_is_always_accepted() -> None:
    probs = torch.rand(4, 3, 9)
    probs /= probs.sum(-1, keepdim=True)
    drafts = torch.stack([sample_tokens(probs[:, j], torch.rand(4, dtype=torch.float64)) for j in range(3)], 1)
    target = torch.cat([probs, probs[:, :1]], 1)
    uniform = torch.rand(4, 4, dtype=torch.float64)
    assert verify_sampled(target, probs, drafts, uniform[:, :3], uniform)[0].tolist() == [3] * 4


def test_the_biased_rule_that_forgets_the_residual_would_be_caught() -> None:
    """Drawing the token after a rejection from p instead of max(p - q, 0) shifts the distribution measurably."""
    target, draft = markov(1, 5), markov(2, 5)
    num = 100_000
    root_p, q = target[0], draft[0]
    drafted = sample_tokens(q.expand(num, 5), torch.rand(num, dtype=torch.float64))
    accepted = torch.rand(num) * q[drafted] < root_p[drafted]
    redrawn = sample_tokens(root_p.expand(num, 5), torch.rand(num, dtype=torch.float64))
    counts = torch.bincount(torch.where(accepted, drafted, redrawn), minlength=5).double()
    assert 0.5 * (counts / num - root_p).abs().sum() > 0.03
