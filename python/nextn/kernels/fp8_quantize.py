"""float8_e4m3fn quantization: x ≈ q · scale, with scale = amax / 448.

Floor: one read of x and one write of a quarter or half of it; limited by memory. ``norm_quantize`` in rms_norm.py and
``silu_mul_quantize`` in silu_mul.py make x and quantize it in one pass.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
ROWS_AT_ONCE = 4096
"""Of a weight that torch quantizes: what it computes with are copies of them in float32."""


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row (compressed-tensors, strategy "token", dynamic).

    x: [M, K]; rows may be further apart than they are long
    Returns q [M, K] float8_e4m3fn and scale [M, 1] float32. A row of zeros gets scale 1.
    """
    if gpu.suits(x):
        return _launch_quantize(x, None)
    return _quantize_reference(x, None)


def quantize_per_group(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row and group of columns (DeepSeek-V3, section 3.3.2).

    x: [M, K]; the last group may be shorter
    Returns q [M, K] float8_e4m3fn and scale [M, ⌈K / group_size⌉] float32.
    """
    if gpu.suits(x) and group_size == gpu.next_power_of_2(group_size):
        return _launch_quantize(x, group_size)
    return _quantize_reference(x, group_size)


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per output row of a weight [N, K]. Returns q [N, K] and scale [N, 1] float32.

    By torch everywhere: it is done once, and for cards without FP8 units Triton cannot round to FP8. Some rows at a
    time, as torch makes copies.
    """
    q, scale = empty_quantized(weight, weight.shape[1], None)
    for first in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        q[rows], scale[rows] = _quantize_reference(weight[rows], None)
    return q, scale


def empty_quantized(x: torch.Tensor, num_columns: int, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the result of quantizing rows: q [M, num_columns] and scale [M, 1] or [M, ⌈num_columns / group⌉]."""
    num_scales = 1 if group_size is None else gpu.cdiv(num_columns, group_size)
    q = torch.empty(x.shape[0], num_columns, dtype=FP8, device=x.device)
    return q, torch.empty(x.shape[0], num_scales, dtype=torch.float32, device=x.device)


def warps_for_row(num_columns: int) -> int:
    """Enough that a thread holds 32 values of a row at most, up to 16 warps."""
    return min(max(gpu.next_power_of_2(num_columns) // 1024, 1), 16)


def _quantize_reference(x: torch.Tensor, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    if group_size is None:
        return _quantize(x.float(), x.float().abs().amax(-1, keepdim=True))
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group_size)).view(rows, -1, group_size)
    q, scale = _quantize(padded, padded.abs().amax(-1, keepdim=True))
    return q.view(rows, -1)[:, :columns], scale[..., 0]


def _quantize(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = amax / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)  # zeros, and values so small that the scale underflows
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def _launch_quantize(x: torch.Tensor, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    q, scale = empty_quantized(x, columns, group_size)
    if rows:
        gpu.launch(
            _quantize_rows,
            (rows,),
            x,
            q,
            scale,
            x.stride(0),
            columns,
            num_warps=warps_for_row(columns),
            GROUP=group_size or 0,
            BLOCK=max(gpu.next_power_of_2(columns), group_size or 1),
        )
    return q, scale


@jit
def store_quantized(values, q, scale, row, columns, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantize one row and store it; what is not a number stays so.

    values: [BLOCK] float32, zero beyond ``columns``; GROUP: 0 for the whole row
    """
    offsets = tl.arange(0, BLOCK)
    if GROUP == 0:
        one = tl.math.div_rn(tl.max(tl.abs(values), 0), 448.0)
        one = tl.where(one > 0, one, 1.0)
        tl.store(scale + row, one)
        scaled = tl.math.div_rn(values, tl.zeros((BLOCK,), tl.float32) + one)
        codes = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    else:
        groups: tl.constexpr = BLOCK // GROUP
        grouped, each = quantized_rows(tl.reshape(values, (groups, GROUP)))
        codes = tl.reshape(grouped, (BLOCK,))
        num_groups = tl.cdiv(columns, GROUP)
        index = tl.arange(0, groups)
        tl.store(scale + row * num_groups + index, each, mask=index < num_groups)
    tl.store(q + row * columns + offsets, codes, mask=offsets < columns)


@jit
def quantized_rows(values):  # type: ignore[no-untyped-def]
    """Codes [M, K] and a scale per row [M] of float32 values; what is not a number stays so."""
    scales = tl.math.div_rn(tl.max(tl.abs(values), 1), tl.full((values.shape[0],), 448.0, tl.float32))
    scales = tl.where(scales > 0, scales, 1.0)
    scaled = tl.math.div_rn(values, tl.broadcast_to(scales[:, None], values.shape))
    return tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv), scales


@jit
def _quantize_rows(x, q, scale, stride, columns, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    store_quantized(values, q, scale, row, columns, GROUP, BLOCK)
