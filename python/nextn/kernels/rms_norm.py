"""RMSNorm (Zhang & Sennrich, 2019), with float32 statistics.

Floor: one read and write of x; limited by memory, at small batches by launches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nextn.kernels import native


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension.

    x: [..., H]; weight: [H], or any shape that broadcasts to x
    Returns [..., H] in x's dtype.
    """
    if weight.dim() == 1 and x.dtype == torch.float32:
        if native.cpu is not None and native.suits(x) and native.suits(weight):
            out = torch.empty_like(x)
            size = weight.shape[0]
            native.cpu.rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps, out.data_ptr())
            return out
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight
