"""SwiGLU's elementwise part (Shazeer, 2020). Floor: read 2 · M · I, write M · I; limited by memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    gate_up: [..., 2I], the gate half first
    Returns [..., I].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
