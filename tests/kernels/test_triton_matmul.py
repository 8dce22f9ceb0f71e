"""The Triton products against float64, over ragged sizes, every epilogue, and both ways of cutting them up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from nextn.kernels import gpu, matmul
from nextn.kernels.fp8_dequantize import dequantize
from nextn.kernels.fp8_quantize import quantize_per_channel, quantize_per_group, quantize_per_token
from nextn.kernels.linear import Rows, linear, store_weight
from nextn.kernels.matmul import block_fp8_matmul, w8a8_matmul, wide_matmul
from nextn.kernels.matmul_config import MAX_TILES, choose_config, num_tiles

from tests.kernels.references import need_fp8_units, quantize_blocks, sum_loss

SIZES = [(1, 64, 128), (3, 100, 200), (17, 96, 640), (64, 70, 1100), (65, 130, 144), (200, 300, 256)]


def _check(got: torch.Tensor, exact: torch.Tensor, parts: torch.Tensor, loss: float = 4e-6) -> None:
    """got against the float64 result; parts: Σ |terms|, of which float32 loses a few last bits."""
    assert bool(((got.cpu().double() - exact).abs() <= loss * parts + 1e-30).all())


@pytest.mark.parametrize("epilogue", ["plain", "bias", "residual", "both"])
@pytest.mark.parametrize("size", SIZES)
def test_per_token_and_per_channel(size: tuple[int, int, int], epilogue: str, device: torch.device) -> None:
    need_fp8_units(device)
    m, n, k = size
    x, x_scale = quantize_per_token(torch.randn(m, k) * torch.logspace(-2, 2, m)[:, None])
    w, w_scale = quantize_per_channel(torch.randn(n, k))
    bias = torch.randn(n).bfloat16() if epilogue in ("bias", "both") else None
    residual = torch.randn(m, n) if epilogue in ("residual", "both") else None
    wide_x, wide_w = x.double() * x_scale.double(), w.double() * w_scale.double()
    exact, parts = wide_x @ wide_w.T, wide_x.abs() @ wide_w.abs().T
    for term in (bias, residual):
        if term is not None:
            exact, parts = exact + term.double(), parts + term.double().abs()
    moved = [None if t is None else t.to(device) for t in (x, x_scale, w, w_scale, bias, residual)]
    counters, loss = torch.zeros(MAX_TILES, dtype=torch.int32, device=device), sum_loss(x, device)
    _check(w8a8_matmul(*moved, counters=counters), exact, parts, loss)  # type: ignore[arg-type]
    assert not counters.any(), "the counters are ready for the next product"
    _check(w8a8_matmul(*moved, batch_invariant=True), exact, parts, loss)  # type: ignore[arg-type]
    rounded = w8a8_matmul(*moved, out_dtype=torch.bfloat16)  # type: ignore[arg-type]
    torch.testing.assert_close(rounded.cpu().double(), exact, rtol=2**-8, atol=float(parts.max()) * loss)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("size", [(1, 64, 128), (3, 100, 384), (64, 70, 1152), (65, 130, 256), (200, 300, 256)])
def test_per_group_and_per_channel(size: tuple[int, int, int], group: int, device: torch.device) -> None:
    """Attention's heads have scales of their own, whatever the weight's are."""
    need_fp8_units(device)
    m, n, k = size
    x, x_scale = quantize_per_group(torch.randn(m, k) * torch.logspace(-2, 2, k), group)
    w, w_scale = quantize_per_channel(torch.randn(n, k))
    residual = torch.randn(m, n)
    wide_x, wide_w = x.double() * x_scale.double().repeat_interleave(group, 1), w.double() * w_scale.double()
    exact, parts = wide_x @ wide_w.T + residual.double(), wide_x.abs() @ wide_w.abs().T + residual.double().abs()
    moved = [None if t is None else t.to(device) for t in (x, x_scale, w, w_scale, None, residual)]
    loss = sum_loss(x, device)
    for batch_invariant in (False, True):
        _check(w8a8_matmul(*moved, batch_invariant=batch_invariant), exact, parts, loss)  # type: ignore[arg-type]
    _check(w8a8_matmul(x, x_scale, w, w_scale, None, residual), exact, parts, loss)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (48, 256)])
@pytest.mark.parametrize("size", SIZES)
def test_per_block(size: tuple[int, int, int], block: tuple[int, int], device: torch.device) -> None:
    need_fp8_units(device)
    m, n, k = size
    x, x_scale = quantize_per_group(torch.randn(m, k), block[1])
    w, w_scale = quantize_blocks(torch.randn(n, k) * torch.logspace(-1, 1, k), block)
    wide_x = x.double() * x_scale.double().repeat_interleave(block[1], 1)[:, :k]
    wide_w = dequantize(w, w_scale, block).double()
    moved = [t.to(device) for t in (x, x_scale, w, w_scale)]
    got = block_fp8_matmul(*moved, block)
    _check(got, wide_x @ wide_w.T, wide_x.abs() @ wide_w.abs().T, sum_loss(x, device))


@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_wide_activations_meet_widened_codes(
    size: tuple[int, int, int], dtype: torch.dtype, block: tuple[int, int] | None, device: torch.device
) -> None:
    m, n, k = size
    x = torch.randn(m, k).to(dtype)
    weight = torch.randn(n, k)
    w, w_scale = quantize_per_channel(weight) if block is None else quantize_blocks(weight, block)
    wide_w = dequantize(w, w_scale, block).double()
    x, w, w_scale = x.to(device), w.to(device), w_scale.to(device)
    got = w8a8_matmul(x, None, w, w_scale) if block is None else block_fp8_matmul(x, None, w, w_scale, block)
    x = x.cpu().double()
    _check(got, x @ wide_w.T, x.abs() @ wide_w.abs().T)


def test_every_code_is_widened_exactly(device: torch.device) -> None:
    """All 256 codes but the two NaNs, subnormals included, through a product with the identity."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    w = codes.view(torch.float8_e4m3fn)[:, None].expand(256, 16).contiguous()
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 3] = 1
    got = w8a8_matmul(x.to(device), None, w.to(device), torch.ones(256, 1, device=device))
    assert torch.equal(got.cpu()[0], w[:, 3].float())


def test_a_scale_per_tensor(device: torch.device) -> None:
    need_fp8_units(device)
    x, w = torch.randn(5, 64).to(torch.float8_e4m3fn), torch.randn(40, 64).to(torch.float8_e4m3fn)
    one, other = torch.tensor([0.5]), torch.tensor([[3.0]])
    got = w8a8_matmul(*(t.to(device) for t in (x, one, w, other)))
    wide_x, wide_w = x.double(), 1.5 * w.double()
    _check(got, wide_x @ wide_w.T, wide_x.abs() @ wide_w.abs().T, sum_loss(x, device))


def test_batch_invariance_is_exact(device: torch.device) -> None:
    need_fp8_units(device)
    x, x_scale = quantize_per_token(torch.randn(130, 384))
    w, w_scale = quantize_per_channel(torch.randn(72, 384))
    x, x_scale, w, w_scale = (t.to(device) for t in (x, x_scale, w, w_scale))
    whole = w8a8_matmul(x, x_scale, w, w_scale, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 129)):
        alone = w8a8_matmul(x[rows].contiguous(), x_scale[rows].contiguous(), w, w_scale, batch_invariant=True)
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("block", [None, 32, (128, 128), (64, 32)])
@pytest.mark.parametrize("size", [(65, 130, 144), (150, 300, 256)])
def test_copies_by_descriptor_give_the_same(
    size: tuple[int, int, int],
    block: int | tuple[int, int] | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """block: of both, or of x alone, or of none"""
    need_fp8_units(device)
    m, n, k = size
    k -= k % block if isinstance(block, int) else 0
    x, w = torch.randn(m, k), torch.randn(n, k)
    if not isinstance(block, tuple):
        operands = (
            *(quantize_per_token(x) if block is None else quantize_per_group(x, block)),
            *quantize_per_channel(w),
        )
    else:
        operands = (*quantize_per_group(x, block[1]), *quantize_blocks(w, block))
    moved = [t.to(device) for t in operands]
    multiply = partial(block_fp8_matmul, block=block) if isinstance(block, tuple) else w8a8_matmul
    plain = multiply(*moved)
    described: list[torch.Tensor] = []
    original = gpu.described
    monkeypatch.setattr(matmul, "MIN_ROWS_FOR_DESCRIPTORS", 1)
    monkeypatch.setattr(gpu, "described", lambda x, block: described.append(x) or original(x, block))
    assert torch.equal(multiply(*moved), plain)
    assert len(described) == (2 if gpu.has_descriptors(device) else 0)


@pytest.mark.parametrize(
    ("dtype", "epilogue"),
    [(torch.bfloat16, "plain"), (torch.bfloat16, "both"), (torch.float16, "bias"), (torch.float16, "residual")],
)
@pytest.mark.parametrize("size", SIZES)
def test_weights_that_are_not_quantized(
    size: tuple[int, int, int], dtype: torch.dtype, epilogue: str, device: torch.device
) -> None:
    m, n, k = size
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if epilogue in ("bias", "both") else None
    residual = torch.randn(m, n).to(dtype) if epilogue in ("residual", "both") else None
    exact, parts = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    for term in (bias, residual):
        if term is not None:
            exact, parts = exact + term.double(), parts + term.double().abs()
    moved = [None if t is None else t.to(device) for t in (x, w, bias, residual)]
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    _check(wide_matmul(*moved, out_dtype=torch.float32, counters=counters), exact, parts)  # type: ignore[arg-type]
    assert not counters.any(), "the counters are ready for the next product"
    for batch_invariant in (False, True):
        rounded = wide_matmul(*moved, batch_invariant=batch_invariant)  # type: ignore[arg-type]
        assert rounded.dtype == dtype
        # Torch's own product, for many rows, rounds once before the residual is added.
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
        assert bool(((rounded.cpu().double() - exact).abs() <= 2 * rounding * parts).all())


def test_unquantized_batch_invariance_is_exact(device: torch.device) -> None:
    x, w = torch.randn(130, 384).bfloat16().to(device), torch.randn(72, 384).bfloat16().to(device)
    whole = wide_matmul(x, w, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 129)):
        assert torch.equal(wide_matmul(x[rows].contiguous(), w, batch_invariant=True), whole[rows])


def test_rows_that_are_not_neighbours(device: torch.device) -> None:
    """A view of some columns, as of a hidden state beside another."""
    both, w = torch.randn(9, 512).bfloat16().to(device), torch.randn(70, 256).bfloat16().to(device)
    assert torch.equal(wide_matmul(both[:, 256:], w), wide_matmul(both[:, 256:].contiguous(), w))


def test_without_a_gpu_torch_multiplies() -> None:
    x, w, bias = torch.randn(5, 48), torch.randn(30, 48), torch.randn(30)
    torch.testing.assert_close(wide_matmul(x, w, bias), x @ w.T + bias)


H100 = {"processors": 132, "shared_memory": 227 << 10}
W8A8 = {"x_bytes": 1, "weight_bytes": 1, "has_groups": False, **H100}


def test_few_rows_split_k_so_that_the_card_is_busy() -> None:
    for n, k in [(4096, 12288), (5120, 12288), (14336, 4096)]:
        for m in (1, 16, 64):
            config = choose_config(m, n, k, **W8A8)
            assert num_tiles(m, n, config.block_m, config.block_n) * config.split_k >= 0.9 * 132
            assert k / config.block_k / config.split_k >= 4
    assert choose_config(4096, 4096, 4096, **W8A8).split_k == 1


@pytest.mark.parametrize(("n", "k", "split_k"), [(4096, 12288, 4), (5120, 12288, 3), (14336, 4096, 1)])
def test_programs_that_share_no_processor_run_at_once(n: int, k: int, split_k: int) -> None:
    """Air's and 4.6's o_proj and qkv_proj, 64 rows whose scales are per group."""
    config = choose_config(64, n, k, **{**W8A8, "has_groups": True})
    assert config.split_k == split_k
    assert num_tiles(64, n, config.block_m, config.block_n) * config.split_k <= 132


@pytest.mark.parametrize(("x_bytes", "weight_bytes"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit_the_card(shared_memory: int, x_bytes: int, weight_bytes: int) -> None:
    for m in (1, 16, 17, 64, 65, 200, 512, 8192):
        for n, k in [(4096, 12288), (151552, 4096), (64, 64)]:
            config = choose_config(
                m,
                n,
                k,
                x_bytes=x_bytes,
                weight_bytes=weight_bytes,
                has_groups=False,
                processors=108,
                shared_memory=shared_memory,
            )
            step = (config.block_m * x_bytes + config.block_n * weight_bytes) * config.block_k
            assert 2 <= config.num_stages <= shared_memory // step
            assert config.split_k == 1 or num_tiles(m, n, config.block_m, config.block_n) <= MAX_TILES


def test_batch_invariance_cuts_every_batch_alike() -> None:
    configs = {choose_config(m, 4096, 12288, batch_invariant=True, **W8A8) for m in (1, 16, 65, 4096)}
    assert len(configs) == 1
    assert configs.pop().split_k == 1


def test_a_weight_that_is_quantized_alone_takes_its_input_wide(device: torch.device) -> None:
    """Also beside others, for which its input was quantized."""
    x = torch.randn(3, 64, dtype=torch.bfloat16, device=device)
    codes, scale = quantize_per_channel(torch.randn(32, 64, device=device))
    weight = store_weight(codes, None, scale, None, batch_invariant=False, quantizes_input=False)
    spoilt = Rows(torch.zeros_like(x).to(torch.float8_e4m3fn), torch.ones(3, 1, device=device), x, x.dtype)
    assert torch.equal(linear(spoilt, weight), linear(x, weight))
    exact = x.double() @ (codes.double() * scale.double()).t()
    assert float((linear(x, weight).double() - exact).norm() / exact.norm()) < 0.005


def test_a_weight_with_blocks_takes_no_input_that_was_quantized_by_the_token(device: torch.device) -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16, device=device)
    codes, scale = quantize_blocks(torch.randn(32, 64, device=device), (16, 32))
    weight = replace(store_weight(codes, None, scale, (16, 32), batch_invariant=False), quantizes_input=True)
    for_others = Rows(*quantize_per_token(x), x, x.dtype)
    assert torch.equal(linear(for_others, weight), linear(x, weight))
