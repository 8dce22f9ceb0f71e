"""Which drafts to keep, and the one token that follows them.

A chain that is shorter than others ends the accepted run like a rejection, and the token there comes from the target
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextn.kernels.verify import NO_TOKEN, accept_and_draw, check_widths

NO_DRAFT = NO_TOKEN
"""Stands where a chain is shorter than the longest of the batch."""


def verify_greedy(target_tokens: Sequence[int], chains: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Keep drafts as long as each equals the target's most likely token.

    target_tokens: the target's choice after the root and after each draft, len(chain) + 1 per chain, chain by chain
    Returns per chain the number of accepted drafts and the token that follows them.
    Raises ValueError if the lengths do not fit.
    """
    num_rows = sum(len(chain) + 1 for chain in chains)
    if len(target_tokens) != num_rows:
        raise ValueError(f"the chains need {num_rows} target rows, found {len(target_tokens)}")
    num_accepted: list[int] = []
    final: list[int] = []
    root = 0
    for chain in chains:
        accepted = 0
        while accepted < len(chain) and chain[accepted] == target_tokens[root + accepted]:
            accepted += 1
        num_accepted.append(accepted)
        final.append(target_tokens[root + accepted])
        root += len(chain) + 1
    return num_accepted, final


def verify_sampled(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_tokens: torch.Tensor,
    accept_uniform: torch.Tensor,
    final_uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling: the kept tokens are distributed exactly as the target's (Leviathan et al., 2023, alg. 1).

    A draft d is accepted with probability min(1, p(d) / q(d)). The token after the accepted run is drawn from
    max(p - q, 0), renormalised, after a rejection, and from p after the last draft (where q is zero, the two agree).

    target_probs: [n, k + 1, V] float32, rows sum to 1
    draft_probs: [n, k, V] float32, the distributions the drafts were drawn from; zero rows beyond a chain's end
    draft_tokens: [n, k] int64, NO_DRAFT beyond a chain's end
    accept_uniform: [n, k] float64 in [0, 1); final_uniform: [n, k + 1] float64 in [0, 1), by position
    Returns the number of accepted drafts [n] int64 and the token that follows them [n] int64.
    Raises ValueError if k differs between the arguments.
    """
    num_drafts = draft_tokens.shape[1]
    check_widths(target_probs.shape[1], num_drafts)
    check_widths(target_probs.shape[1], draft_probs.shape[1])
    return accept_and_draw(target_probs, draft_probs, draft_tokens, accept_uniform, final_uniform)
