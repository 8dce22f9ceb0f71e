"""The torch side of a public function, where a test has sent its calls to Triton; what cards do otherwise; weights in
blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from nextn.kernels import gpu
from nextn.kernels.fp8_quantize import FP8, FP8_MAX


def in_torch(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function returns without Triton. Tensors are taken as they are; give it those of the CPU."""
    with mock.patch.object(gpu, "suits", return_value=False):
        return function(*arguments, **options)


def quantize_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as checkpoints with one scale per block hold it; the last blocks may be smaller.

    weight: [N, K]
    Returns q [N, K] float8_e4m3fn and scale [⌈N / block_n⌉, ⌈K / block_k⌉] float32, 1 where it would be 0.
    """
    (n, k), (block_n, block_k) = weight.shape, block
    padded = torch.nn.functional.pad(weight.float(), (0, -k % block_k, 0, -n % block_n))
    blocks = padded.view(padded.shape[0] // block_n, block_n, padded.shape[1] // block_k, block_k)
    scale = blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    q = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return q.view(padded.shape)[:n, :k].contiguous(), scale[:, 0, :, 0]


def has_fp8_units(device: torch.device) -> bool:
    """Whether Triton rounds to FP8 and multiplies it there, whatever the server has been told of the card.

    For compute capability 8.0 it knows no FP8: there the server keeps activations wide, and widens codes in integers.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def need_fp8_units(device: torch.device) -> None:
    """For tests of what the server asks of no other card."""
    if not has_fp8_units(device):
        pytest.skip("Triton rounds to FP8, and multiplies it, from compute capability 8.9 on")


def sum_loss(x: torch.Tensor, device: torch.device) -> float:
    """What a sum of products of x may lose, as a share of Σ |terms|: a few last bits of float32.

    A card's FP8 units lose more: they align 32 products and the sum so far to the largest, and keep 14 bits
    (DeepSeek-V3, section 3.3.2).
    """
    return 1e-3 if x.dtype == torch.float8_e4m3fn and device.type == "cuda" else 4e-6
