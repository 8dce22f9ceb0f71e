"""Random weights in the right types, for measuring without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import torch

from nextn.layers.storage import Slot


def fill_dummy(slots: Iterable[Slot], seed: int) -> None:
    """Fill every slot, on its device, with seeded random values that keep activations finite and of order one.

    Norms are near 1, biases small, weights of variance 1 / in_features; FP8 codes of order 100 with scales to match.
    A slot's values depend on its name and part alone, so ranks agree about what they all hold.
    """
    generators: dict[torch.device, torch.Generator] = {}
    fan_in = 1
    for name, view, part in slots:
        if view.device not in generators:
            generators[view.device] = torch.Generator(view.device)
        generator = generators[view.device].manual_seed(seed + crc32(f"{name} {part}".encode()))
        noise = torch.randn(view.shape, generator=generator, device=view.device)
        if name.endswith("norm.weight"):
            view.copy_(1 + 0.1 * noise)
        elif name.endswith("_scale") or name.endswith("_scale_inv"):
            view.copy_((1 + 0.1 * noise).clamp(min=0.5) / (64 * fan_in**0.5))
        elif view.dtype == torch.float8_e4m3fn:
            fan_in = view.shape[1]
            view.copy_((64 * noise).clamp(-448, 448).to(torch.float8_e4m3fn))
        elif name.endswith(".bias") or name.endswith("e_score_correction_bias"):
            view.copy_(0.02 * noise)
        else:
            view.copy_(noise / view.shape[-1] ** 0.5)
