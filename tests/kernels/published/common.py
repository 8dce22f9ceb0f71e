"""Models, batch sizes and tensors without memory, for the launches that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable

import torch

Call = tuple[str, Callable[[], object]]
MODELS = ("glm-4.6", "glm-4.5-air")
NUM_TOKENS = (1, 4, 16, 64, 512, 8192)
META = torch.device("meta")


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def scales(*shape: int) -> torch.Tensor:
    return of(*shape, dtype=torch.float32)
