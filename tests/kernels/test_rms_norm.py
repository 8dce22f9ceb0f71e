"""RMSNorm and SwiGLU's elementwise part against float64."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels import native
from nextn.kernels.rms_norm import rms_norm
from nextn.kernels.silu_mul import silu_mul

SIZES = [1, 7, 16, 64, 100, 256, 5120]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(
    size: int, eps: float, is_compiled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(native, "cpu", None)
    x = (torch.randn(5, size) * torch.tensor([1e-4, 0.1, 1.0, 30.0, 1e4])[:, None]).to(dtype)
    weight = (1 + torch.randn(size) / 4).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    found = rms_norm(x, weight, eps)
    assert found.dtype == dtype
    # A float32 sum of 5,120 squares; in bfloat16 the result is rounded twice, to 8 bits.
    tolerance = 4e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)


def test_each_head_may_have_its_own_weights() -> None:
    x, weight = torch.randn(4, 3, 16), torch.randn(3, 16)
    found = rms_norm(x, weight, 1e-5)
    for head in range(3):
        torch.testing.assert_close(found[:, head], rms_norm(x[:, head].contiguous(), weight[head], 1e-5))


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 64), torch.ones(64), 1e-5), torch.zeros(2, 64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(2, 3, size) * 4).to(dtype), torch.randn(2, 3, size).to(dtype)
    found = silu_mul(torch.cat([gate, up], -1))
    assert found.dtype == dtype
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    tolerance = 4e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)
