"""SwiGLU's elementwise part (Shazeer, 2020). Floor: read 2 · M · I, write M · I; limited by memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nextn.kernels import gpu
from nextn.kernels.fp8_quantize import (
    empty_quantized,
    quantize_per_group,
    quantize_per_token,
    store_quantized,
    warps_for_row,
)
from nextn.kernels.gpu import jit, tl, wait_for_predecessor


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    gate_up: [..., 2I], the gate half first
    Returns [..., I].
    """
    if gate_up.dim() == 2 and gpu.suits(gate_up):
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        _launch_silu_mul(gate_up, out, None, None)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_quantize(gate_up: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up in float32, quantized per token, or per group of group_size columns.

    gate_up: [M, 2I], the gate half first
    Returns q [M, I] float8_e4m3fn and scale [M, 1] or [M, ⌈I / group_size⌉] float32.
    """
    if not gpu.suits(gate_up):
        activated = silu_mul(gate_up.float())
        return quantize_per_token(activated) if group_size is None else quantize_per_group(activated, group_size)
    q, scale = empty_quantized(gate_up, gate_up.shape[1] // 2, group_size)
    _launch_silu_mul(gate_up, q, scale, group_size)
    return q, scale


def _launch_silu_mul(
    gate_up: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None, group_size: int | None
) -> None:
    """scale: None stores the products themselves."""
    rows, columns = out.shape
    if rows:
        gpu.launch(
            _silu_mul_rows,
            (rows,),
            gate_up.contiguous(),
            out,
            out if scale is None else scale,
            columns,
            num_warps=warps_for_row(columns),
            QUANTIZE=scale is not None,
            GROUP=group_size or 0,
            BLOCK=max(gpu.next_power_of_2(columns), group_size or 1),
        )


@jit
def _silu_mul_rows(  # type: ignore[no-untyped-def]
    gate_up, out, scale, columns, QUANTIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """One program per row."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    first = gate_up + row * 2 * columns
    gate = tl.load(first + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(first + columns + offsets, mask=mask, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    if QUANTIZE:
        store_quantized(product, out, scale, row, columns, GROUP, BLOCK)
    else:
        tl.store(out + row * columns + offsets, product.to(out.dtype.element_ty), mask=mask)
