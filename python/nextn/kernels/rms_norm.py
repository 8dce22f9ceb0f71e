"""RMSNorm (Zhang & Sennrich, 2019), with float32 statistics.

Floor: one read and write of x; limited by memory, at small batches by launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nextn.kernels import gpu, native
from nextn.kernels.fp8_quantize import (
    empty_quantized,
    quantize_per_group,
    quantize_per_token,
    store_quantized,
    warps_for_row,
)
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.moe_combine import ExpertTerms, moe_combine, sum_of_pairs

WARPS_FOR_TERMS = 16
"""So that a thread asks for all of its experts' terms at once."""


@dataclass(frozen=True)
class NormedRows:
    """What one pass over the residual stream makes.

    sum: [M, H], x + residual, or the sum of the experts' terms; x itself without either
    normed: [M, H] in x's dtype
    q, scale: normed, quantized per token [M, 1] or per group [M, ⌈H / group_size⌉]; None where not asked for
    """

    sum: torch.Tensor
    normed: torch.Tensor
    q: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension.

    x: [..., H]; weight: [H], or any shape that broadcasts to x
    Returns [..., H] in x's dtype.
    """
    if weight.dim() == 1 and gpu.suits(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        return _launch_norm(rows, None, None, weight, eps, quantize=False, group_size=None).normed.view(x.shape)
    if weight.dim() == 1 and x.dtype == torch.float32:
        if native.cpu is not None and native.suits(x) and native.suits(weight):
            out = torch.empty_like(x)
            size = weight.shape[0]
            native.cpu.rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps, out.data_ptr())
            return out
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def norm_quantize(
    x: torch.Tensor | ExpertTerms,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    quantize: bool = True,
    group_size: int | None = None,
) -> NormedRows:
    """RMSNorm of x + residual, or of the sum of experts' terms, which have their own, and its FP8 quantization.

    x, residual: [M, H]; weight: [H]
    quantize: whether q and scale are made, per token or per group of group_size columns
    """
    if isinstance(x, ExpertTerms):
        assert residual is None, "the terms have their own"
        if gpu.suits(x.pairs, weight):
            return _launch_norm(x.pairs, x, x.residual, weight, eps, quantize=quantize, group_size=group_size)
        x = moe_combine(x)
    if gpu.suits(x, weight, residual):
        return _launch_norm(x, None, residual, weight, eps, quantize=quantize, group_size=group_size)
    total = x if residual is None else x + residual
    normed = rms_norm(total, weight, eps)
    if not quantize:
        return NormedRows(total, normed)
    q, scale = quantize_per_token(normed) if group_size is None else quantize_per_group(normed, group_size)
    return NormedRows(total, normed, q, scale)


def _launch_norm(
    x: torch.Tensor,
    terms: ExpertTerms | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    quantize: bool,
    group_size: int | None,
) -> NormedRows:
    """x: [M, H], or the pairs of the terms"""
    columns = x.shape[1]
    x = x.contiguous()
    rows = x.shape[0] if terms is None else terms.num_tokens
    normed = x.new_empty(rows, columns)
    total = x if terms is None and residual is None else torch.empty_like(normed)
    q, scale = empty_quantized(normed, columns, group_size) if quantize else (None, None)
    if rows:
        gpu.launch(
            _norm_rows,
            (rows,),
            x,
            x if terms is None else terms.expert_weights.contiguous(),
            x if residual is None else residual.contiguous(),
            weight,
            total,
            normed,
            normed if q is None else q,
            normed if scale is None else scale,
            columns,
            eps,
            num_warps=warps_for_row(columns) if terms is None else WARPS_FOR_TERMS,
            TOP_K=0 if terms is None else terms.expert_weights.shape[1],
            PAIRS_PER_TOKEN=0 if terms is None else terms.pairs_per_token,
            HAS_RESIDUAL=residual is not None,
            QUANTIZE=quantize,
            GROUP=group_size or 0,
            BLOCK=max(gpu.next_power_of_2(columns), group_size or 1),
        )
    return NormedRows(total, normed, q, scale)


@jit
def _norm_rows(  # type: ignore[no-untyped-def]
    x,
    expert_weights,
    residual,
    weight,
    total,
    normed,
    q,
    scale,
    columns,
    eps,
    TOP_K: tl.constexpr,
    PAIRS_PER_TOKEN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per row. The sum and the normed row are rounded to x's dtype before they are used further.

    PAIRS_PER_TOKEN: 0 where x is a row, else how many terms it has
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    weights = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    wait_for_predecessor(EARLY)
    if PAIRS_PER_TOKEN > 0:
        values = sum_of_pairs(x, expert_weights, row, offsets, columns, TOP_K, PAIRS_PER_TOKEN, BLOCK)
    else:
        values = tl.load(x + row * columns + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * columns + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL or PAIRS_PER_TOKEN > 0:
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * columns + offsets, rounded, mask=mask)
        values = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(values * values, 0) / columns + eps)
    scaled = values * factor * weights
    out = scaled.to(normed.dtype.element_ty)
    tl.store(normed + row * columns + offsets, out, mask=mask)
    if QUANTIZE:
        store_quantized(out.to(tl.float32), q, scale, row, columns, GROUP, BLOCK)
