"""Loaded weights made ready to compute with."""

from __future__ import annotations

from torch import nn

from nextn.layers.embedding import OutputHead
from nextn.layers.linear import Linear
from nextn.layers.moe import Experts


def prepare_weights(model: nn.Module) -> None:
    """Expand FP8 weights by their scales and lay matrices out for the CPU, one module at a time."""
    for module in model.modules():
        if isinstance(module, Linear | Experts | OutputHead):
            module.prepare()
