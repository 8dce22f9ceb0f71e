"""The canary's verdict, and what it is made of."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from nextn.demo import checkpoint_dir
from nextn.speculative.canary import MIN_CHAINS, REPETITIONS, SENTENCES, canary_prompts, judge
from nextn.text.tokenizer import Tokenizer


def outcomes(first: float, after: float, num: int = 100, seed: int = 0) -> list[tuple[int, int]]:
    """Chains of 3 drafts: the first accepted with probability ``first``, each later one after the one before."""
    rng = random.Random(seed)
    found = []
    for _ in range(num):
        accepted = int(rng.random() < first)
        while 0 < accepted < 3 and rng.random() < after:
            accepted += 1
        found.append((3, accepted))
    return found


def test_a_prompt_is_a_users_turn_of_one_sentence_repeated() -> None:
    tokenizer = Tokenizer(checkpoint_dir())
    for sentence, ids in zip(SENTENCES, canary_prompts(checkpoint_dir()), strict=True):
        turn = {"role": "user", "content": " ".join([sentence] * REPETITIONS)}
        assert ids == tokenizer.encode(tokenizer.apply_chat_template([turn]), add_special_tokens=False)


def test_without_a_tokenizer_there_is_no_prompt(tmp_path: Path) -> None:
    assert canary_prompts(tmp_path) == []
    (tmp_path / "tokenizer.json").write_text("{")
    assert canary_prompts(tmp_path) == []


@pytest.mark.parametrize(("first", "after"), [(0.95, 0.95), (0.7, 0.7), (0.6, 0.6)])
def test_a_working_head_raises_nothing(first: float, after: float) -> None:
    """The last of these has an accept length of 2.2 with 3 drafts, as GLM-4.6 on ordinary text."""
    for seed in range(50):
        result = judge(outcomes(first, after, seed=seed), 3, 0.1)
        assert result.verdict == "healthy", result.message
        assert result.acceptance is not None
        assert result.acceptance.drafted_per_position == [100, 100, 100]


@pytest.mark.parametrize(
    ("first", "after", "likely"),
    [
        (0.0, 0.0, "without their scales"),
        (0.1, 0.5, "halves of eh_proj's input swapped"),
        (0.3, 0.3, "no draft KV over the prompt"),
        (0.8, 0.1, "carried from draft to draft"),
    ],
)
def test_a_sick_head_is_called_so_with_what_is_likely(first: float, after: float, likely: str) -> None:
    result = judge(outcomes(first, after), 3, 0.1)
    assert result.verdict == "sick"
    assert likely in result.message
    assert "a working head reaches" in result.message


def test_a_single_draft_per_step_is_judged_by_its_position_alone() -> None:
    assert judge([(1, 1)] * 60, 1, 0.1).verdict == "healthy"
    assert judge([(1, 0)] * 60, 1, 0.1).verdict == "sick"


def test_too_few_chains_say_nothing() -> None:
    result = judge([(3, 0)] * (MIN_CHAINS - 1), 3, 0.1)
    assert result.verdict == "skipped"
    assert "ended its answers" in result.message
