"""Triton's row kernels (quantization, norm, SwiGLU) against the same functions in torch."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels import fp8_quantize, gpu, rms_norm, silu_mul

from tests.kernels.references import need_fp8_units

SHAPES = [(1, 16), (3, 100), (5, 128), (2, 300), (7, 1408)]


def _rows(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different size, one of zeros, one with a value far out."""
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    x[rows // 2] = 0
    x[-1, columns // 2] = 1e4
    return x.to(dtype)


@pytest.mark.parametrize("group_size", [None, 16, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantization_equals_torch_bit_for_bit(
    shape: tuple[int, int], group_size: int | None, device: torch.device
) -> None:
    need_fp8_units(device)
    x = _rows(*shape)
    q, scale = fp8_quantize._quantize_reference(x, group_size)
    got_q, got_scale = (
        fp8_quantize.quantize_per_token(x.to(device))
        if group_size is None
        else fp8_quantize.quantize_per_group(x.to(device), group_size)
    )
    assert torch.equal(got_scale.cpu(), scale)
    assert torch.equal(got_q.float().cpu(), q.float())


@pytest.mark.parametrize("num_rows", [0, 1, 8, 13])
def test_weights_are_quantized_on_cards_without_fp8_units_too(
    num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch, a few rows at a time, which changes nothing."""
    weight = torch.randn(num_rows, 48).bfloat16().to(device)
    q, scale = fp8_quantize._quantize_reference(weight, None)
    monkeypatch.setattr(gpu, "has_fp8_units", lambda device: False)
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **options: pytest.fail("Triton cannot round to FP8 there"))
    monkeypatch.setattr(fp8_quantize, "ROWS_AT_ONCE", 4)
    got_q, got_scale = fp8_quantize.quantize_per_channel(weight)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got_q.float(), q.float())


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("by_triton", [False, True])
def test_what_is_not_a_number_does_not_become_one(
    by_triton: bool, value: float, group_size: int | None, device: torch.device
) -> None:
    x = torch.randn(2, 48).bfloat16()
    x[0, 20] = value
    if by_triton:
        need_fp8_units(device)
    quantize = fp8_quantize._launch_quantize if by_triton else fp8_quantize._quantize_reference
    q, scale = quantize(x.to(device), group_size)
    wide = q.float().cpu() * scale.cpu().repeat_interleave(group_size or 48, 1)
    assert not wide[0, 20].isfinite()
    assert bool(wide[1].isfinite().all())


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_residual_and_quantization_in_one_pass(
    shape: tuple[int, int], has_residual: bool, quantize: bool, device: torch.device
) -> None:
    if quantize:
        need_fp8_units(device)
    x = _rows(*shape)
    residual = torch.randn(shape).bfloat16() if has_residual else None
    weight = (1 + 0.2 * torch.randn(shape[1])).bfloat16()
    total = (x.float() + residual.float()).bfloat16() if residual is not None else x
    exact = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    moved = None if residual is None else residual.to(device)
    got = rms_norm.norm_quantize(x.to(device), weight.to(device), 1e-5, residual=moved, quantize=quantize)
    assert torch.equal(got.sum.cpu(), total)
    # One rounding to bfloat16.
    torch.testing.assert_close(got.normed.cpu().double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(rms_norm.rms_norm(total.to(device), weight.to(device), 1e-5), got.normed)
    assert (got.q is not None) == quantize
    if got.q is not None and got.scale is not None:
        q, scale = fp8_quantize._quantize_reference(got.normed.cpu(), None)
        assert torch.equal(got.q.float().cpu(), q.float())
        assert torch.equal(got.scale.cpu(), scale)


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_quantization_in_one_pass(
    shape: tuple[int, int], group_size: int | None, device: torch.device
) -> None:
    rows, columns = shape
    gate_up = torch.randn(rows, 2 * columns).bfloat16() * 4
    gate, up = gate_up.double().chunk(2, -1)
    exact = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_mul.silu_mul(gate_up.to(device)).cpu().double(), exact, rtol=2**-8, atol=1e-6)
    need_fp8_units(device)
    q, scale = silu_mul.silu_mul_quantize(gate_up.to(device), group_size)
    wide = scale.cpu().double().repeat_interleave(group_size or columns, 1)[:, :columns]
    # Half a step of e4m3 (3 bits of mantissa), and of the smallest step, 2⁻⁹ scales.
    error = (q.cpu().double() * wide - exact).abs()
    assert bool((error <= exact.abs() * (2**-4 + 1e-4) + wide * 2**-10).all())


def test_no_rows_are_no_launch(device: torch.device) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
    assert fp8_quantize.quantize_per_token(x)[0].shape == (0, 64)
    assert rms_norm.rms_norm(x, torch.ones(64, dtype=torch.bfloat16, device=device), 1e-5).shape == (0, 64)
    assert silu_mul.silu_mul(x).shape == (0, 32)


def test_without_a_gpu_torch_runs() -> None:
    assert not gpu.suits(torch.zeros(1)), "tensors on a CPU are not Triton's"
