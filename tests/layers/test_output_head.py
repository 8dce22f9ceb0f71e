"""The output head as FP8: the same logits up to the codes' precision, on any card."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels import fp8_quantize, gpu
from nextn.kernels.linear import StoredWeight
from nextn.layers.embedding import OutputHead


@pytest.mark.parametrize("vocab_size", [7, 64, 1000])
def test_a_head_that_becomes_fp8_gives_the_logits_of_its_codes(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_quantize, "ROWS_AT_ONCE", 64)
    weight, hidden = torch.randn(vocab_size, 48) * torch.logspace(-2, 1, vocab_size)[:, None], torch.randn(5, 48)
    head = OutputHead(weight.clone(), None, vocab_size)
    copy = head.fp8_copy()
    for one in (head, copy):
        one.prepare(batch_invariant=False)
    step = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / step).to(torch.float8_e4m3fn).double() * step.double()
    torch.testing.assert_close(copy.forward(hidden).double(), hidden.double() @ codes.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(head.forward(hidden), hidden @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("has_fp8_units", [False, True])
def test_no_kernel_is_needed_to_make_it(has_fp8_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards without FP8 units have none that could."""
    monkeypatch.setattr(gpu, "suits", lambda *tensors: True)
    monkeypatch.setattr(gpu, "has_fp8_units", lambda device: has_fp8_units)
    monkeypatch.setattr(gpu, "launch", lambda kernel, *others, **options: pytest.fail(f"{kernel} is launched"))
    head = OutputHead(torch.randn(40, 48).bfloat16(), None, 40).fp8_copy()
    head.prepare(batch_invariant=False)
    assert isinstance(head.packed, StoredWeight)
    assert head.packed.weight.dtype == torch.float8_e4m3fn
    assert head.packed.quantizes_input == has_fp8_units
