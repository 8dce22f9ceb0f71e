"""What requests ask of their logits: what is kept of it between steps, and what a step still does for it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.sequence import Sequence
from nextn.speculative.logits import LogitAdjuster, Row
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 1200


class Operations(TorchDispatchMode):
    """Counts torch's operations, and the elements of the largest tensor that one of them takes."""

    def __init__(self) -> None:
        super().__init__()
        self.num = self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num += 1
        self.largest = max([self.largest, *(x.numel() for x in args if isinstance(x, torch.Tensor))])
        return func(*args, **(kwargs or {}))


def sequence(prompt: list[int], **fields: Any) -> Sequence:
    sampling = TokenSampling(max_new_tokens=99, seed=0, **fields)
    return Sequence(AddRequest(rid="a", input_ids=prompt, sampling=sampling), 0, 0.0, 99, frozenset([3, 9]))


def rows_of(seq: Sequence, drafts: list[int]) -> list[Row]:
    return [Row(seq, drafts[:j]) for j in range(len(drafts) + 1)]


def test_a_thousand_biases_take_as_many_operations_as_one() -> None:
    logits = torch.randn(4, VOCAB)

    def num_operations(num_biases: int) -> int:
        seq = sequence([1], logit_bias={token: 0.1 * token for token in range(num_biases)})
        adjuster = LogitAdjuster()
        adjuster.adjust(logits, rows_of(seq, [5, 6, 7]))
        with Operations() as operations:
            adjusted = adjuster.adjust(logits, rows_of(seq, [5, 6, 7]))
        expected = logits.clone()
        for token in range(num_biases):
            expected[:, token] += 0.1 * token
        assert torch.equal(adjusted, expected)
        return operations.num

    assert num_operations(1000) == num_operations(1)


@pytest.mark.parametrize("rule", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_prompt_is_read_once_for_penalties(rule: str) -> None:
    seq = sequence([token % VOCAB for token in range(9 * VOCAB)], **{rule: 1.5})
    adjuster, logits = LogitAdjuster(), torch.randn(4, VOCAB)
    for _ in range(2):
        with Operations() as operations:
            adjuster.adjust(logits, rows_of(seq, [5, 6, 5]))
        seq.append([7, 8])
    assert operations.largest == logits.numel()


def test_penalties_follow_a_sequence_as_it_grows() -> None:
    repetition, presence, frequency = 1.5, 0.5, 0.25
    seq = sequence([1, 1, 2], repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    adjuster, logits = LogitAdjuster(), torch.randn(3, VOCAB)
    for new in ([], [4], [5, 5, 2], [6, 4]):
        seq.append(new)
        adjusted = adjuster.adjust(logits, rows_of(seq, [4, 7]))
        for j, found in enumerate(adjusted):
            counts = Counter([*seq.tokens[seq.num_prompt :], *[4, 7][:j]])
            expected = logits[j].clone()
            for token in {1, 2, *counts}:
                value = expected[token]
                value.copy_(value / repetition if value > 0 else value * repetition)
                value -= frequency * counts[token] + presence * (counts[token] > 0)
            torch.testing.assert_close(found, expected)


def test_what_is_kept_of_a_sequence_ends_with_it() -> None:
    adjuster = LogitAdjuster()
    seq = sequence([1], logit_bias={5: 1.0}, repetition_penalty=1.1)
    adjuster.adjust(torch.zeros(1, VOCAB), rows_of(seq, []))
    assert len(adjuster._asked) == 1
    del seq
    gc.collect()
    assert not adjuster._asked
