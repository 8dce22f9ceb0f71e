"""The compiled kernels of ``cpu/kernels.inc``, where the installation had a C compiler; None where it had not.

They serve float32 on a CPU. Every kernel has a torch reference, which runs where these do not.
"""

from __future__ import annotations

from types import ModuleType

import torch

INTERFACE = 1
"""Of the compiled kernels that this code calls. A clone that was pulled may have older ones until it is reinstalled."""


def load() -> ModuleType | None:
    """The compiled kernels, if there are any that this code can call."""
    try:
        from nextn.kernels import _cpu
    except ImportError:
        return None
    return _cpu if getattr(_cpu, "interface", 0) == INTERFACE else None


cpu: ModuleType | None = load()


def suits(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can take this tensor."""
    return cpu is not None and x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()
