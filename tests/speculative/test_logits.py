"""What requests ask of their logits: what is kept of it between steps, and what a step still does for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.sequence import Sequence
from nextn.speculative.logits import LogitAdjuster, Row
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 1200


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num += 1
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


def test_what_is_kept_of_a_sequence_ends_with_it() -> None:
    adjuster = LogitAdjuster()
    seq = sequence([1], logit_bias={5: 1.0}, repetition_penalty=1.1)
    adjuster.adjust(torch.zeros(1, VOCAB), rows_of(seq, []))
    assert len(adjuster._asked) == 1
    del seq
    gc.collect()
    assert not adjuster._asked
