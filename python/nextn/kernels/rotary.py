"""Rotary position embedding on the first part of each head, half-split ("NeoX") pairing.

Floor: one read and write of q and k; limited by launches at small batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryTable:
    """Precomputed rotations for whole heads: dimensions beyond rotary_dim keep cos = 1 and sin = 0.

    cos, sin: [max_positions, head_dim] float32; sin is negative on the first half of each pair
    partner: [head_dim] int64, the dimension each one is paired with (itself where not rotated)
    rotary_dim: how many dimensions are rotated
    """

    cos: torch.Tensor
    sin: torch.Tensor
    partner: torch.Tensor
    rotary_dim: int


def make_rotary_table(
    head_dim: int, rotary_dim: int, theta: float, max_positions: int, device: torch.device | None = None
) -> RotaryTable:
    """Angles position / theta^(2i / rotary_dim) for i < rotary_dim / 2 (Su et al., 2021, "RoFormer")."""
    half = rotary_dim // 2
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] / theta**exponent
    cos = torch.ones(max_positions, head_dim)
    sin = torch.zeros(max_positions, head_dim)
    cos[:, :rotary_dim] = angles.cos().repeat(1, 2)
    sin[:, :half] = -angles.sin()
    sin[:, half:rotary_dim] = angles.sin()
    partner = torch.arange(head_dim)
    partner[:half] += half
    partner[half:rotary_dim] -= half
    return RotaryTable(cos.to(device), sin.to(device), partner.to(device), rotary_dim)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Rotate heads to their positions.

    x: [T, num_heads, head_dim]
    cos, sin: [T, 1, head_dim], rows of a RotaryTable; partner: [head_dim]
    Returns [T, num_heads, head_dim] in x's dtype.
    """
    rotated = torch.addcmul(x * cos, x.index_select(-1, partner), sin)
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)
