"""The routed experts' SwiGLU MLPs over a batch of tokens.

Floor: the weights of each expert that is touched, read once: 3 · I · H elements; limited by memory until an expert sees
a few hundred tokens.
"""

from __future__ import annotations

import torch

from nextn.kernels.silu_mul import silu_mul


def fused_moe(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)).

    Tokens are sorted by expert, so that each expert's weights are read once, without copying them.

    x: [T, H]; expert_ids: [T, K] int64; expert_weights: [T, K] float32
    w13: [E, 2I, H], gate rows first; w2: [E, H, I]
    Returns [T, H] in x's dtype.
    """
    num_tokens, top_k = expert_ids.shape
    num_pairs = num_tokens * top_k
    ordered, order = expert_ids.view(-1).sort(stable=True)
    sources = x.index_select(0, order // top_k)
    gate_up = x.new_empty(num_pairs, w13.shape[1])
    down = x.new_empty(num_pairs, w2.shape[1])
    segments = _segments(ordered.tolist())
    for expert, first, end in segments:
        torch.mm(sources[first:end], w13[expert].t(), out=gate_up[first:end])
    activated = silu_mul(gate_up)
    for expert, first, end in segments:
        torch.mm(activated[first:end], w2[expert].t(), out=down[first:end])
    # Back to token order, so that a token's sum does not depend on what else is in the batch.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(num_pairs, device=order.device))
    per_token = down.index_select(0, back).view(num_tokens, top_k, -1)
    return torch.bmm(expert_weights[:, None].to(x.dtype), per_token)[:, 0]


def _segments(ordered_experts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first pair, end) for each run of equal experts."""
    segments: list[tuple[int, int, int]] = []
    first = 0
    for i in range(1, len(ordered_experts) + 1):
        if i == len(ordered_experts) or ordered_experts[i] != ordered_experts[first]:
            segments.append((ordered_experts[first], first, i))
            first = i
    return segments
