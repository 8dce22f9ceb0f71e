"""Triton, where it is installed; elsewhere every kernel's torch reference runs, on whatever device the tensors are on.

All launches go through ``launch``, so that one place says what a launch is made of. A kernel's tensors, sizes and
strides are positional; what it is compiled for is a keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without
    triton = None
    tl = None

__all__ = [
    "can_be_described",
    "cdiv",
    "described",
    "has_descriptors",
    "has_fp8_units",
    "jit",
    "launch",
    "next_power_of_2",
    "num_processors",
    "shared_memory",
    "suits",
    "tl",
]


def jit(function: Callable[..., Any] | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """``triton.jit``; the bare function, which nobody calls, where there is no Triton.

    varying: integers that change from step to step, and tensors that begin anywhere in others, so that one compiled
        kernel serves all their values, and all alignments
    """
    if function is None:
        return partial(jit, varying=varying)
    return triton.jit(function, do_not_specialize=varying) if triton is not None else function


def suits(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton's kernels can take these tensors."""
    if triton is None:
        return False
    for x in tensors:  # noqa: SIM110 - asked several times a layer; a generator takes twice as long
        if x is not None and not x.is_cuda:
            return False
    return True


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


def has_descriptors(device: torch.device) -> bool:
    """Whether the card copies tiles by descriptor (its tensor memory accelerator; compute capability 9.0 and up)."""
    return _capability(device) >= (9, 0)


def can_be_described(x: torch.Tensor) -> bool:
    """Whether a matrix lies as descriptors want it: rows contiguous, and aligned to 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def described(x: torch.Tensor, block: tuple[int, int]) -> Any:
    """A matrix, for a kernel that loads it in tiles of ``block``; what lies beyond its ends is read as zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, list(block))


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the card."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have: the processor's, less the KiB that CUDA keeps."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
