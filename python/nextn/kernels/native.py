"""The compiled kernels of ``cpu/kernels.inc``, where the installation had a C compiler; None where it had not.

They serve float32 on a CPU. Every kernel has a torch reference, which runs where these do not.
"""

from __future__ import annotations

from types import ModuleType

import torch

try:
    from nextn.kernels import _cpu

    cpu: ModuleType | None = _cpu
except ImportError:
    cpu = None


def suits(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can take this tensor."""
    return cpu is not None and x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()
