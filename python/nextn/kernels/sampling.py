"""From logits to a distribution to a token.

Floor: one read of the logits [R, V] in float32; a sort where top-k or top-p is on. Limited by memory.
"""

from __future__ import annotations

import torch


def sampling_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The distribution that sampling draws from: temperature, then top-k, then top-p, then min-p, renormalised.

    logits: [R, V] float32
    temperature: [R] float32; 0 puts all mass on the first largest logit
    top_k: [R] int64, 0 for all; top_p: [R] float32 in (0, 1]; min_p: [R] float32 in [0, 1);
        None where no row uses it
    Returns [R, V] float32, rows sum to 1.
    """
    greedy = temperature == 0
    probs = torch.softmax(logits / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    if top_k is not None or top_p is not None:
        probs = _truncate(probs, top_k, top_p)
    if min_p is not None:
        probs = torch.where(probs < min_p[:, None] * probs.amax(-1, keepdim=True), 0.0, probs)
    probs = probs / probs.sum(-1, keepdim=True)
    if bool(greedy.any()):
        one_hot = torch.zeros_like(probs).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(greedy[:, None], one_hot, probs)
    return probs


def _truncate(probs: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Keep the top_k likeliest tokens, and of their renormalised mass the smallest set that reaches top_p."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(probs.shape[-1], device=probs.device)
        ordered = torch.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0.0, ordered)
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if top_p is not None:
        mass_before = ordered.cumsum(-1) - ordered
        cut = mass_before >= top_p[:, None]
        cut[:, 0] = False
        ordered = torch.where(cut & (top_p[:, None] < 1.0), 0.0, ordered)
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def sample_tokens(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    probs: [R, V] float32, non-negative, not all zero in a row; they need not sum to 1
    uniform: [R] float64 in [0, 1)
    Returns [R] int64; a token of zero probability is never drawn.
    """
    cumulative = probs.to(torch.float64).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)
