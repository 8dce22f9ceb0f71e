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
    if num_tokens == 1:
        return _moe_of_one_token(x, expert_ids[0].tolist(), expert_weights, w13, w2)
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


def _moe_of_one_token(
    x: torch.Tensor,
    experts: list[int],
    expert_weights: torch.Tensor,
    w13: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
) -> torch.Tensor:
    """fused_moe for T = 1, where nothing needs to be sorted: half of a draft step's launches."""
    gate_up = x.new_empty(len(experts), w13[0].shape[1])
    for expert, out in zip(experts, gate_up.split(1), strict=True):
        torch.mm(x, w13[expert], out=out)
    activated = (silu_mul(gate_up) * expert_weights.view(-1, 1).to(x.dtype)).split(1)
    total = torch.mm(activated[0], w2[experts[0]])
    for expert, source in zip(experts[1:], activated[1:], strict=True):
        total.addmm_(source, w2[expert])
    return total


def _runs(ordered: list[int]) -> tuple[list[int], list[int]]:
    """The distinct values of a sorted list, and how often each occurs."""
    counts: dict[int, int] = {}
    for value in ordered:
        counts[value] = counts.get(value, 0) + 1
    return list(counts), list(counts.values())
