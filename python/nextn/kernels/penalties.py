"""Repetition, presence and frequency penalties, and logit bias, for one row of logits.

Floor: one read and write of the row; only rows of requests that ask for it are touched.
"""

from __future__ import annotations

import torch


def apply_penalties(
    logits: torch.Tensor,
    prompt_tokens: torch.Tensor,
    output_tokens: torch.Tensor,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> torch.Tensor:
    """Penalise tokens that stand in the context already.

    repetition (Keskar et al., 2019): a seen token's logit is divided by it if positive, multiplied if negative;
        prompt and output count. presence and frequency (OpenAI): subtracted once, and once per occurrence, output only.
    logits: [V] float32
    prompt_tokens, output_tokens: [n] int64 token ids, repeats included
    Returns [V] float32, a new tensor.
    """
    vocab_size = logits.shape[0]
    counts = torch.bincount(output_tokens, minlength=vocab_size)
    if repetition != 1.0:
        seen = counts.bool().index_fill(0, prompt_tokens, True)
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * counts - presence * (counts > 0)
