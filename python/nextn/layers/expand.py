"""Weights ready to compute with on a CPU."""

from __future__ import annotations

from torch import nn

from nextn.layers.linear import Linear
from nextn.layers.moe import Experts


def expand_weights(model: nn.Module) -> None:
    """Expand every FP8 weight of ``model`` by its scales into the computing type, one module at a time."""
    for module in model.modules():
        if isinstance(module, Linear | Experts) and _is_fp8(module):
            module.expand_weights()


def _is_fp8(module: Linear | Experts) -> bool:
    schemes = (module.scheme,) if isinstance(module, Linear) else (module.w13_scheme, module.w2_scheme)
    return any(scheme.is_quantized for scheme in schemes)
