"""What a request asks of its logits, at each row of a verify step: bias, penalties, minimum length, temperature, …

A row is one position whose next token is wanted: the root of a sequence, or one of its drafts. Row j of a sequence sees
the context that holds if the first j drafts are accepted, so every rule is exact at every draft position.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from nextn.kernels.gpu import upload
from nextn.kernels.penalties import apply_penalties
from nextn.kernels.sampling_probs import sampling_probs
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.sequence import Sequence


class Row(NamedTuple):
    """One position of a sequence, after ``drafts`` that are not yet part of it."""

    seq: Sequence
    drafts: list[int]

    @property
    def sampling(self) -> TokenSampling:
        return self.seq.request.sampling

    @property
    def position(self) -> int:
        """Index that the token chosen here will have in the sequence."""
        return len(self.seq.tokens) + len(self.drafts)


class LogitAdjuster:
    """Applies logit_bias, penalties, min_new_tokens and grammars.

    What a sequence asks is made into tensors once, which are kept while the sequence lives.
    """

    def __init__(self) -> None:
        self._asked: WeakKeyDictionary[Sequence, _Asked] = WeakKeyDictionary()

    def adjust(self, logits: torch.Tensor, rows: Rows[Row], allowed: np.ndarray | None = None) -> torch.Tensor:
        """Apply what each row's sequence asks, as it holds behind the row's drafts.

        logits: [R, V] float32, one row per Row
        allowed: [R, ⌈V / 32⌉] int32, the tokens that grammars allow, a bit each; None for all
        Returns [R, V] float32: ``logits`` itself if no row asks for anything, else a changed copy.
        """
        adjusted = logits
        end = 0
        for seq, group in groupby(rows, key=lambda row: row.seq):
            drafts = [row.drafts for row in group]
            start, end = end, end + len(drafts)
            sampling = seq.request.sampling
            if not sampling.has_rules:
                continue
            if adjusted is logits:
                adjusted = logits.clone()
            asked = self._asked_by(seq, logits)
            of_seq = adjusted[start:end]
            if sampling.has_penalties:
                of_seq.copy_(asked.penalised(of_seq, seq, drafts))
            for row, behind in zip(of_seq, drafts, strict=True):
                if sampling.logit_bias:
                    row.index_add_(0, asked.bias_ids, asked.bias_values)
                if seq.num_output + len(behind) < sampling.min_new_tokens:
                    row.index_fill_(0, asked.stop_ids, float("-inf"))
        return adjusted if allowed is None else _masked(adjusted, upload(allowed, device=logits.device))

    def _asked_by(self, seq: Sequence, logits: torch.Tensor) -> _Asked:
        asked = self._asked.get(seq)
        if asked is None:
            asked = self._asked[seq] = _Asked(seq, logits.shape[1], logits.device)
        return asked


class _Asked:
    """What one sequence asks, and what its penalties read of its context, on the device.

    bias_ids: [B] int64, distinct; bias_values: [B] float32; stop_ids: [P] int64
    """

    def __init__(self, seq: Sequence, vocab_size: int, device: torch.device) -> None:
        sampling = seq.request.sampling
        bias = sampling.logit_bias
        self.bias_ids = upload(list(bias), dtype=torch.int64, device=device)
        self.bias_values = upload(list(bias.values()), dtype=torch.float32, device=device)
        self.stop_ids = upload(sorted(seq.stop_ids), dtype=torch.int64, device=device)
        size = vocab_size if sampling.has_penalties else 0
        self._in_prompt = torch.zeros(size, dtype=torch.bool, device=device)
        self._output_counts = torch.zeros(size, dtype=torch.int32, device=device)
        self._num_counted = seq.num_prompt
        if sampling.repetition_penalty != 1.0:
            self._in_prompt.index_fill_(0, upload(seq.tokens[: seq.num_prompt], device=device), True)

    def penalised(self, logits: torch.Tensor, seq: Sequence, drafts: Rows[list[int]]) -> torch.Tensor:
        """Apply penalties to the sequence's rows.

        logits: [n, V] float32
        drafts: those before each row, of which the first row's are the beginning of all
        Returns [n, V] float32, a new tensor.
        """
        self._count(self._output_counts, seq.tokens[self._num_counted :])
        self._num_counted = len(seq.tokens)
        num_rows, vocab_size = logits.shape
        counts = self._output_counts.clone()
        self._count(counts, drafts[0])
        counts = counts.repeat(num_rows, 1)
        own = [j * vocab_size + token for j, row in enumerate(drafts) for token in row[len(drafts[0]) :]]
        self._count(counts.view(-1), own)
        sampling = seq.request.sampling
        return apply_penalties(
            logits,
            self._in_prompt,
            counts,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
        )

    @staticmethod
    def _count(counts: torch.Tensor, tokens: list[int]) -> None:
        """Add one for each token, in place."""
        if tokens:
            index = upload(tokens, device=counts.device)
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))


def _masked(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """logits: [R, V]; words: [R, ⌈V / 32⌉] int32, the lowest bit first. -inf where a token's bit is not set."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))


def probs_of_rows(logits: torch.Tensor, rows: Rows[Row]) -> torch.Tensor:
    """The distribution each row is drawn from.

    logits: [R, V] float32, adjusted
    Returns [R, V] float32, rows sum to 1; greedy rows are one-hot.
    """
    params = [row.sampling for row in rows]
    device = logits.device

    def rule(values: list[Any], off: float) -> torch.Tensor | None:
        """None where all are off, but on a GPU, where each choice of rules would be kernels of its own to compile."""
        dtype = torch.int64 if isinstance(off, int) else torch.float32
        is_given = device.type == "cuda" or any(value != off for value in values)
        return upload(values, dtype=dtype, device=device) if is_given else None

    return sampling_probs(
        logits,
        upload([p.temperature for p in params], dtype=torch.float32, device=device),
        rule([p.top_k for p in params], 0),
        rule([p.top_p for p in params], 1.0),
        rule([p.min_p for p in params], 0.0),
    )
