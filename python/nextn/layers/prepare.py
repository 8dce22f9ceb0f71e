"""Loaded weights made ready to compute with."""

from __future__ import annotations

from torch import nn

from nextn.layers.attention import Attention
from nextn.layers.embedding import OutputHead
from nextn.layers.linear import Linear
from nextn.layers.mlp import MLP
from nextn.layers.moe import Experts, MoE


def prepare_weights(model: nn.Module, *, batch_invariant: bool = False) -> None:
    """Lay matrices out for the device they are on; parts before what is made of them.

    batch_invariant: on a GPU, sum in an order that does not depend on what else is in the batch
    """
    for module in reversed(list(model.modules())):
        if isinstance(module, Linear | Attention | Experts | OutputHead | MLP | MoE):
            module.prepare(batch_invariant=batch_invariant)
