"""The weighted sum of what a token's experts made. Floor: read T · pairs · H, write T · H; limited by memory.

Where a norm comes next it sums up itself, see ``norm_quantize``: a launch and a pass over the sum less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor

BLOCK = 1024


@dataclass(frozen=True)
class ExpertTerms:
    """What a token's experts made, before it is summed: Σ over a token's pairs of weight · row, plus residual.

    pairs: [T · P, H]; expert_weights: [T, K] float32, K of P pairs, a pair beyond has weight 1; residual: [T, H]
    """

    pairs: torch.Tensor
    expert_weights: torch.Tensor
    residual: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.expert_weights.shape[0]

    @property
    def pairs_per_token(self) -> int:
        return self.pairs.shape[0] // max(self.num_tokens, 1)


def moe_combine(terms: ExpertTerms) -> torch.Tensor:
    """The sum, in float32 and in the order of the pairs, the residual last.

    Returns [T, H] in the pairs' dtype.
    """
    pairs, expert_weights, residual = terms.pairs, terms.expert_weights, terms.residual
    num_tokens, top_k = expert_weights.shape
    hidden = pairs.shape[1]
    if not gpu.suits(pairs):
        rows = pairs.view(num_tokens, terms.pairs_per_token, hidden).float()
        out = (rows[:, :top_k] * expert_weights[:, :, None]).sum(1) + rows[:, top_k:].sum(1)
        return (out if residual is None else out + residual.float()).to(pairs.dtype)
    out = pairs.new_empty(num_tokens, hidden)
    if num_tokens:
        gpu.launch(
            _combine,
            (num_tokens, gpu.cdiv(hidden, BLOCK)),
            pairs,
            expert_weights.contiguous(),
            out if residual is None else residual.contiguous(),
            out,
            hidden,
            num_warps=4,
            HAS_RESIDUAL=residual is not None,
            TOP_K=top_k,
            PAIRS_PER_TOKEN=terms.pairs_per_token,
            BLOCK=min(BLOCK, gpu.next_power_of_2(hidden)),
        )
    return out


@jit
def _combine(  # type: ignore[no-untyped-def]
    pairs,
    expert_weights,
    residual,
    out,
    hidden,
    HAS_RESIDUAL: tl.constexpr,
    TOP_K: tl.constexpr,
    PAIRS_PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token, columns)."""
    wait_for_predecessor(EARLY)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    total = sum_of_pairs(pairs, expert_weights, token, columns, hidden, TOP_K, PAIRS_PER_TOKEN, BLOCK)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * hidden + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + columns, total.to(out.dtype.element_ty), mask=mask)


@jit
def sum_of_pairs(  # type: ignore[no-untyped-def]
    pairs,
    expert_weights,
    token,
    columns,
    hidden,
    TOP_K: tl.constexpr,
    PAIRS_PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's pairs, weighted and summed in their order, at BLOCK columns of [0, hidden)."""
    mask = columns < hidden
    rows = pairs + token * PAIRS_PER_TOKEN * hidden + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for pair in tl.static_range(PAIRS_PER_TOKEN):
        values = tl.load(rows + pair * hidden, mask=mask, other=0.0).to(tl.float32)
        if pair < TOP_K:
            values *= tl.load(expert_weights + token * TOP_K + pair)
        total += values
    return total
