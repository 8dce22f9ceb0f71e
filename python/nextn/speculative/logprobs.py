"""Log-probabilities for requests that ask: of the model's own distribution, before any sampling rule."""

from __future__ import annotations

import torch

from nextn.protocol.messages import TokenLogprobs
from nextn.scheduler.scheduler import Extend

MAX_ROWS = 256
"""Rows of logits that are made at once: in a large vocabulary those of a whole prompt take gigabytes."""


def token_logprobs(logits: torch.Tensor, tokens: list[int], num_top: int) -> list[TokenLogprobs]:
    """The logprob of each row's token, and the row's ``num_top`` likeliest tokens.

    logits: [R, V] float32, as the model gave them
    tokens: R token ids
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprobs(token, value) for token, value in zip(tokens, chosen, strict=True)]
    values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(token, value, top) for token, value, top in zip(tokens, chosen, tops, strict=True)]


def prompt_rows(extend: Extend) -> range:
    """Of the extend's new tokens, the rows that predict prompt tokens whose logprobs are wanted and not yet known."""
    seq, start = extend.seq, extend.seq.request.prompt_logprobs_start
    if start is None:
        return range(0)
    first = max(start + len(seq.prompt_logprobs or ()), 1)
    stop = min(extend.end, seq.num_prompt - 1) + 1
    return range(first - 1 - extend.start, max(first, stop) - 1 - extend.start)


def slices(rows: range) -> list[range]:
    """The rows, MAX_ROWS at a time."""
    return [rows[first : first + MAX_ROWS] for first in range(0, len(rows), MAX_ROWS)]
