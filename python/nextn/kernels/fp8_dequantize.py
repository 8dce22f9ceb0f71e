"""float8_e4m3fn codes in wider types: whole weights in torch, a kernel's tile in registers.

Floor of a whole weight: a read of its codes and a write four times as large; limited by memory.
"""

from __future__ import annotations

import torch

from nextn.kernels.gpu import jit, tl


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


@jit
def widened(codes, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float8_e4m3fn codes, as uint8, in a wider type, exactly.

    Put into float16's fields, a code stands for its value · 2⁻⁸, subnormals included.
    """
    bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
    return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
