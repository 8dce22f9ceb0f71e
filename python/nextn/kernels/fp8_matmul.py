"""Products of FP8 activations and FP8 weights, accumulated in float32.

Floor: the weight's N · K bytes at small M, limited by memory; 2 · M · N · K FLOPs at large M, limited by arithmetic.
"""

from __future__ import annotations

import torch


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """weight · scale in float32.

    weight: [N, K] float8_e4m3fn
    scale: [N, 1] per channel, one element per tensor, or [⌈N / block_n⌉, ⌈K / block_k⌉] with ``block``
    Returns [N, K] float32.
    """
    if block is None:
        return weight.float() * (scale if scale.numel() > 1 else scale.view(()))
    rows = torch.arange(weight.shape[0], device=weight.device) // block[0]
    columns = torch.arange(weight.shape[1], device=weight.device) // block[1]
    return weight.float() * scale.index_select(0, rows).index_select(1, columns)


def w8a8_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x · x_scale) (weight · weight_scale)ᵀ + bias, the scales applied to the float32 sum.

    x: [M, K] float8_e4m3fn; x_scale: [M, 1] float32, or one element
    weight: [N, K] float8_e4m3fn; weight_scale: [N, 1] float32, or one element
    bias: [N]
    Returns [M, N] float32.
    """
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.view(1, -1)
    return out if bias is None else out + bias.float()


def block_fp8_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    block: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ over blocks of K of (x · weightᵀ) · x_scale · weight_scale + bias (DeepSeek-V3, section 3.3.2).

    x: [M, K] float8_e4m3fn; x_scale: [M, ⌈K / block_k⌉] float32
    weight: [N, K] float8_e4m3fn; weight_scale: [⌈N / block_n⌉, ⌈K / block_k⌉] float32
    bias: [N]
    Returns [M, N] float32.
    """
    block_n, block_k = block
    out = x_scale.new_zeros(x.shape[0], weight.shape[0])
    rows = torch.arange(weight.shape[0], device=weight.device) // block_n
    for j, first in enumerate(range(0, x.shape[1], block_k)):
        columns = slice(first, first + block_k)
        partial = x[:, columns].float() @ weight[:, columns].float().t()
        out += partial * x_scale[:, j : j + 1] * weight_scale[rows, j]
    return out if bias is None else out + bias.float()
