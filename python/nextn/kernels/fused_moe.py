"""The routed experts' SwiGLU MLPs over a batch of tokens.

Floor: the weights of each expert that is touched, read once: 3 · I · H elements; limited by memory until an expert sees
a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextn.kernels.silu_mul import silu_mul


def fused_moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    w13: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)).

    Tokens are sorted by expert, so that each expert's weights are read once, without copying them.

    x: [T, H]; expert_ids: [T, K] int64; expert_weights: [T, K] float32
    w13: E views [H, 2I], the gate's columns first; w2: E views [I, H]
    Returns [T, H] in x's dtype.
    """
    num_tokens, top_k = expert_ids.shape
    num_pairs = num_tokens * top_k
    ordered, order = expert_ids.view(-1).sort(stable=True)
    experts, sizes = _runs(ordered.tolist())
    gate_up = x.new_empty(num_pairs, w13[0].shape[1])
    down = x.new_empty(num_pairs, w2[0].shape[1])
    sources = x.index_select(0, order // top_k).split(sizes)
    for expert, source, out in zip(experts, sources, gate_up.split(sizes), strict=True):
        torch.mm(source, w13[expert], out=out)
    activated = silu_mul(gate_up).split(sizes)
    for expert, source, out in zip(experts, activated, down.split(sizes), strict=True):
        torch.mm(source, w2[expert], out=out)
    # Back to token order, so that a token's sum does not depend on what else is in the batch.
    in_token_order = torch.empty_like(down).index_copy_(0, order, down)
    return torch.bmm(expert_weights[:, None].to(x.dtype), in_token_order.view(num_tokens, top_k, -1))[:, 0]


def _runs(ordered: list[int]) -> tuple[list[int], list[int]]:
    """The distinct values of a sorted list, and how often each occurs."""
    counts: dict[int, int] = {}
    for value in ordered:
        counts[value] = counts.get(value, 0) + 1
    return list(counts), list(counts.values())
