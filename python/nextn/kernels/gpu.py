"""Triton, where it is installed; elsewhere every kernel's torch reference runs, on whatever device the tensors are on.

All launches go through ``launch``, so that one place says what a launch is made of. A kernel's tensors, sizes and
strides are positional; what it is compiled for is a keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without
    triton = None
    tl = None

__all__ = ["cdiv", "has_fp8_units", "jit", "launch", "next_power_of_2", "num_processors", "suits", "tl"]


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; the bare function, which nobody calls, where there is no Triton."""
    return triton.jit(function) if triton is not None else function


def suits(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton's kernels can take these tensors."""
    return triton is not None and all(x is None or x.is_cuda for x in tensors)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
) -> None:
    """Run a kernel on the current stream.

    grid: programs along up to three axes
    arguments: its tensors, sizes and strides, in order; constants: its compile-time constants, by name
    """
    kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants)


def has_fp8_units(device: torch.device) -> bool:
    """Whether the card multiplies float8_e4m3fn (compute capability 8.9 and up)."""
    return _capability(device) >= (8, 9)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the card."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
