"""Triton's acceptance of chains against torch's, and what is decided against the target's distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nextn.kernels.random_uniform import ACCEPT_STREAM, DRAFT_STREAM, FINAL_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.kernels.verify import NO_TOKEN, verify_chains, verify_greedy_chains
from nextn.speculative.acceptance import verify_greedy, verify_sampled
from scipy import stats

from tests.kernels.references import in_torch

NUM_SEQS = 6


def rows(*shape: int, sharpness: float = 3.0) -> torch.Tensor:
    """Random distributions, half of whose tokens are impossible."""
    logits = torch.randn(shape) * sharpness
    logits[torch.rand(shape) < 0.5] = -math.inf
    logits[..., 0] = 0.0
    return torch.softmax(logits, -1)


def chains(num_drafts: int, vocab: int) -> dict[str, torch.Tensor]:
    """Drafts drawn from their distributions, so that some are accepted; targets that resemble them.

    Of the last two sequences, one is greedy, with one-hot rows, and one has a chain that ends early.
    """
    draft_probs = rows(NUM_SEQS, num_drafts, vocab)
    target_probs = rows(NUM_SEQS, num_drafts + 1, vocab)
    target_probs[:, :num_drafts] = 0.2 * target_probs[:, :num_drafts] + 0.8 * draft_probs
    uniform = torch.rand(NUM_SEQS * num_drafts, dtype=torch.float64)
    drafts = in_torch(sample_tokens, draft_probs.view(-1, vocab), uniform).view(NUM_SEQS, num_drafts)
    target_probs[-2] = one_hot(target_probs[-2].argmax(-1), vocab)
    if num_drafts:
        drafts[-2] = target_probs[-2, :num_drafts].argmax(-1)
        drafts[-2, -1] = (drafts[-2, -1] + 1) % vocab
        draft_probs[-2] = one_hot(drafts[-2], vocab)
        drafts[-1, num_drafts // 2 :] = NO_TOKEN
        draft_probs[-1, num_drafts // 2 :] = float("nan")
    return {"target_probs": target_probs, "draft_probs": draft_probs, "draft_tokens": drafts}


def one_hot(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, vocab).float()


def keys(start: int) -> dict[str, torch.Tensor]:
    return {
        "seeds": torch.randint(-(2**63), 2**63 - 1, (NUM_SEQS,)),
        "positions": torch.randint(start, start + 10**6, (NUM_SEQS,)),
    }


def moved(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: x.to(device) for name, x in tensors.items()}


@pytest.mark.parametrize("vocab", [24, 1000, 4099])
@pytest.mark.parametrize("num_drafts", range(6))
def test_chains_are_decided_as_by_the_host(num_drafts: int, vocab: int, device: torch.device) -> None:
    of_chains, of_numbers = chains(num_drafts, vocab), keys(num_drafts)
    seeds, positions = of_numbers.values()
    index = positions[:, None] + torch.arange(num_drafts + 1)
    num_accepted, final = in_torch(
        verify_sampled,
        **of_chains,
        accept_uniform=in_torch(random_uniform, seeds, index[:, :num_drafts], ACCEPT_STREAM),
        final_uniform=in_torch(random_uniform, seeds, index, FINAL_STREAM),
    )
    found_accepted, tokens = verify_chains(**moved({**of_chains, **of_numbers}, device))
    assert found_accepted.tolist() == num_accepted.tolist()
    drafts = of_chains["draft_tokens"].tolist()
    for s, accepted in enumerate(num_accepted.tolist()):
        rest = [NO_TOKEN] * (num_drafts - accepted)
        assert tokens[s].tolist() == [*drafts[s][:accepted], int(final[s]), *rest]
    assert num_accepted[-2] == max(num_drafts - 1, 0)
    assert num_accepted[-1] <= num_drafts // 2
    in_reference = in_torch(verify_chains, **of_chains, **of_numbers)
    assert torch.equal(tokens.cpu(), in_reference[1])
    assert torch.equal(found_accepted.cpu(), in_reference[0])


@pytest.mark.parametrize("vocab", [24, 4099])
@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_drafts_chosen_without_chance_need_no_distributions(num_drafts: int, vocab: int, device: torch.device) -> None:
    of_chains, of_numbers = chains(num_drafts, vocab), keys(0)
    drafts = of_chains["draft_tokens"]
    certain = one_hot(drafts.clamp(min=0), vocab) * (drafts != NO_TOKEN)[:, :, None]
    expected = in_torch(verify_chains, **{**of_chains, "draft_probs": certain}, **of_numbers)
    everything = moved({**of_chains, **of_numbers}, device)
    everything.pop("draft_probs")
    found = verify_chains(draft_probs=None, **everything)
    without = in_torch(verify_chains, **{**of_chains, "draft_probs": None}, **of_numbers)
    for got, reference, wanted in zip(found, without, expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
        assert torch.equal(reference, wanted)


def test_draft_rows_may_lie_step_by_step(device: torch.device) -> None:
    of_chains, of_numbers = chains(3, 1000), keys(5)
    expected = verify_chains(**moved({**of_chains, **of_numbers}, device))
    by_step = of_chains["draft_probs"].transpose(0, 1).contiguous().to(device)
    everything = {**moved({**of_chains, **of_numbers}, device), "draft_probs": by_step.transpose(0, 1)}
    for got, wanted in zip(verify_chains(**everything), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_perfect_draft_is_always_accepted(device: torch.device) -> None:
    of_chains = chains(3, 1000)
    of_chains["target_probs"][:, :3] = of_chains["draft_probs"]
    found = verify_chains(**moved({**of_chains, **keys(0)}, device))[0]
    assert found.tolist() == [3] * (NUM_SEQS - 1) + [1], "the last chain has one draft"


def test_a_rejection_without_residual_draws_from_the_target(device: torch.device) -> None:
    """q exceeds p by rounding only where p is; what is left of p - q is nothing."""
    p = torch.zeros(NUM_SEQS, 2, 24)
    p[:, :, [3, 20]] = 0.5
    q = p[:, :1] * (1 + 2**-20)
    drafts = torch.full((NUM_SEQS, 1), 7)  # impossible, so rejected
    _, tokens = verify_chains(**moved({"target_probs": p, "draft_probs": q, "draft_tokens": drafts, **keys(0)}, device))
    assert set(tokens[:, 0].tolist()) <= {3, 20}
    assert tokens[:, 1].tolist() == [NO_TOKEN] * NUM_SEQS


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_decided_tokens_have_the_targets_joint_distribution(
    num_drafts: int, certain: bool, device: torch.device
) -> None:
    """Over many seeds, the first token and the pair of the first two are distributed as the target says."""
    vocab, num = 6, 20_000
    first, second = rows(vocab, sharpness=1.0), rows(vocab, vocab, sharpness=1.0)
    q = rows(num_drafts, vocab, sharpness=1.0).expand(num, -1, -1)
    seeds, positions = torch.arange(num), torch.full((num,), 40)
    drafts = torch.zeros(num, num_drafts, dtype=torch.int64)
    for j in range(num_drafts):
        uniform = in_torch(random_uniform, seeds, positions + j, DRAFT_STREAM)
        drafts[:, j] = q[:, j].argmax(-1) if certain else in_torch(sample_tokens, q[:, j], uniform)
    # Row 1 follows the first draft, row 2 the second: a Markov chain.
    target = torch.cat([first.expand(num, 1, vocab), second[drafts]], dim=1)
    everything = {"target_probs": target, "draft_tokens": drafts, "seeds": seeds, "positions": positions}
    distributions = None if certain else q
    tokens = in_torch(verify_chains, draft_probs=distributions, **everything)[1]
    some = {name: x[:100] for name, x in everything.items()}
    by_triton = verify_chains(draft_probs=None if certain else q[:100].to(device), **moved(some, device))[1]
    assert torch.equal(by_triton.cpu(), tokens[:100])
    counts = np.bincount(tokens[:, 0], minlength=vocab)
    expected = first.double().numpy() * num
    assert counts[expected == 0].sum() == 0
    assert_drawn_from(counts, expected)
    if num_drafts:
        pairs = tokens[tokens[:, 1] != NO_TOKEN]
        for token in range(vocab):
            following = pairs[pairs[:, 0] == token][:, 1]
            assert_drawn_from(np.bincount(following, minlength=vocab), second[token].double().numpy() * len(following))


def assert_drawn_from(counts: np.ndarray, expected: np.ndarray) -> None:
    """By chi-square, over the outcomes expected often enough for it."""
    often = expected > 5
    if often.sum() < 2:
        return
    observed, wanted = (
        np.append(counts[often], counts[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("num_seqs", [1, 5, 33, 64])
@pytest.mark.parametrize("num_drafts", range(6))
def test_greedy_chains_are_decided_as_by_the_host(num_drafts: int, num_seqs: int, device: torch.device) -> None:
    target = torch.randint(0, 3, (num_seqs, num_drafts + 1))
    drafts = torch.randint(0, 3, (num_seqs, num_drafts))
    drafts[-1] = target[-1, :num_drafts]
    drafts[0, num_drafts // 2 :] = NO_TOKEN
    num_accepted, final = verify_greedy(target.flatten().tolist(), drafts.tolist())
    expected = [
        [*chain[:accepted], token, *[NO_TOKEN] * (num_drafts - accepted)]
        for chain, accepted, token in zip(drafts.tolist(), num_accepted, final, strict=True)
    ]
    for found_accepted, tokens in (
        verify_greedy_chains(target.to(device), drafts.to(device)),
        in_torch(verify_greedy_chains, target, drafts),
    ):
        assert found_accepted.tolist() == num_accepted
        assert tokens.tolist() == expected


def test_widths_that_differ_are_refused_and_no_chains_are_no_launch(device: torch.device) -> None:
    ids = torch.zeros(0, 3, dtype=torch.int64, device=device)
    assert verify_greedy_chains(torch.zeros(0, 4, dtype=torch.int64, device=device), ids)[1].shape == (0, 4)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert verify_chains(torch.zeros(0, 4, 24, device=device), None, ids, none, none)[1].shape == (0, 4)
    with pytest.raises(ValueError, match="3 drafts need 4 target rows, found 3"):
        verify_greedy_chains(ids, ids)
    with pytest.raises(ValueError, match="2 drafts need 3 target rows, found 4"):
        verify_chains(torch.zeros(0, 4, 24), torch.zeros(0, 2, 24), ids, none, none)
