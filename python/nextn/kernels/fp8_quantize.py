"""float8_e4m3fn quantization: x ≈ q · scale, with scale = amax / 448.

Floor: one read of x and one write of a quarter or half of it; limited by memory.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row (compressed-tensors, strategy "token", dynamic).

    x: [M, K]
    Returns q [M, K] float8_e4m3fn and scale [M, 1] float32. A row of zeros gets scale 1.
    """
    return _quantize(x.float(), x.float().abs().amax(-1, keepdim=True))


def quantize_per_group(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row and group of columns (DeepSeek-V3, section 3.3.2).

    x: [M, K]; the last group may be shorter
    Returns q [M, K] float8_e4m3fn and scale [M, ⌈K / group_size⌉] float32.
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group_size)).view(rows, -1, group_size)
    q, scale = _quantize(padded, padded.abs().amax(-1, keepdim=True))
    return q.view(rows, -1)[:, :columns], scale[..., 0]


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One given scale for all of x (strategy "tensor", static); values beyond ±448 · scale saturate.

    x: [M, K]; scale: one float32 element
    Returns [M, K] float8_e4m3fn.
    """
    return (x.float() / scale.view(())).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per output row of a weight [N, K]. Returns q [N, K] and scale [N, 1] float32."""
    return quantize_per_token(weight)


def quantize_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per block of a weight; the last blocks may be smaller.

    weight: [N, K]
    Returns q [N, K] float8_e4m3fn and scale [⌈N / block_n⌉, ⌈K / block_k⌉] float32.
    """
    (n, k), (block_n, block_k) = weight.shape, block
    padded = torch.nn.functional.pad(weight.float(), (0, -k % block_k, 0, -n % block_n))
    blocks = padded.view(padded.shape[0] // block_n, block_n, padded.shape[1] // block_k, block_k)
    q, scale = _quantize(blocks, blocks.abs().amax((1, 3), keepdim=True))
    return q.view(padded.shape)[:n, :k].contiguous(), scale[:, 0, :, 0]


def _quantize(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = amax / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)  # zeros, and values so small that the scale underflows
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale
