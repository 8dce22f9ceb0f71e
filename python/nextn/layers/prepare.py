"""Loaded weights made ready to compute with."""

from __future__ import annotations

from torch import nn

from nextn.layers.attention import Attention
from nextn.layers.embedding import OutputHead
from nextn.layers.linear import Linear
from nextn.layers.mlp import MLP
from nextn.layers.moe import Experts, MoE


def prepare_weights(model: nn.Module) -> None:
    """Expand FP8 weights by their scales and lay matrices out for the CPU; parts before what is made of them."""
    for module in reversed(list(model.modules())):
        if isinstance(module, Linear | Attention | Experts | OutputHead | MLP | MoE):
            module.prepare()
