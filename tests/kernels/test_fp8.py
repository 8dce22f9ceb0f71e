"""FP8 quantization and products against definitions written out in float64."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels.fp8_dequantize import dequantize
from nextn.kernels.fp8_quantize import quantize_per_channel, quantize_per_group, quantize_per_token
from nextn.kernels.matmul import block_fp8_matmul, w8a8_matmul

from tests.kernels.references import quantize_blocks

FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1), (3, 128), (5, 129), (128, 127), (130, 300), (256, 256)]
RELATIVE = 2e-6
"""Of the largest output: float32 sums of a few hundred products."""


def e4m3_values() -> torch.Tensor:
    """Every finite value ≥ 0 of the format: 3 bits of mantissa, exponent bias 7, subnormals in steps of 2⁻⁹."""
    subnormal = [mantissa * 2.0**-9 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return torch.tensor((subnormal + normal)[:-1], dtype=torch.float64)  # the last code is NaN


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 value, ties to the even code, saturated at 448. x: float64; returns float64."""
    values = e4m3_values()
    above = torch.searchsorted(values, x.abs()).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    takes_high = x.abs() - low > high - x.abs()
    is_tie = x.abs() - low == high - x.abs()
    index = torch.where(takes_high | (is_tie & (above % 2 == 0)), above, above - 1)
    index = torch.where(x.abs() >= values[-1], len(values) - 1, index)
    return values[index].copysign(x)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, so that a scale of the wrong row shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]


def test_rounding_is_to_nearest_even() -> None:
    values = e4m3_values()
    assert len(values) == 127
    assert values[-1] == 448
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    x = torch.cat([x, -x]).float()
    found, scale = quantize_per_token(x[None])
    assert found.dtype == FP8
    assert scale.item() == 1  # the largest is 448
    assert torch.equal(found[0].double(), rounded(x.double()))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_scale_of_its_largest_value(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = random(rows, columns).to(dtype)
    for quantize in (quantize_per_token, quantize_per_channel):
        q, scale = quantize(x)
        assert scale.shape == (rows, 1)
        assert torch.equal(scale[:, 0], x.float().abs().amax(1) / 448)
        assert torch.equal(q.double(), rounded((x.float() / scale).double()))
        assert torch.equal(q.float().abs().amax(1), torch.full((rows,), 448.0))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_group_has_its_own_scale_and_the_last_may_be_short(rows: int, columns: int) -> None:
    x = random(rows, columns)
    q, scale = quantize_per_group(x, 128)
    assert q.shape == x.shape
    assert scale.shape == (rows, -(-columns // 128))
    for j in range(scale.shape[1]):
        group, columns_of = x[:, 128 * j : 128 * (j + 1)], slice(128 * j, 128 * (j + 1))
        assert torch.equal(scale[:, j], group.abs().amax(1) / 448)
        assert torch.equal(q[:, columns_of].double(), rounded((group / scale[:, j : j + 1]).double()))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("block", [(128, 128), (16, 64)])
def test_a_block_has_its_own_scale_and_the_last_ones_may_be_ragged(
    rows: int, columns: int, block: tuple[int, int]
) -> None:
    weight = random(rows, columns)
    q, scale = quantize_blocks(weight, block)
    assert scale.shape == (-(-rows // block[0]), -(-columns // block[1]))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            assert scale[i, j] == weight[where].abs().max() / 448
            assert torch.equal(q[where].double(), rounded((weight[where] / scale[i, j]).double()))
    # A step of e4m3 is at most 2⁻³ of the value, and subnormals are 2⁻⁹ of the scale apart.
    error = (dequantize(q, scale, block) - weight).abs()
    largest = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    assert bool((error <= weight.abs() * 2**-4 + largest * 2**-10).all())


def test_zeros_stay_zeros_and_divide_by_nothing() -> None:
    x = torch.zeros(3, 130)
    x[1] = 2.0
    found = [quantize_per_token(x), quantize_per_group(x, 128), quantize_blocks(x, (1, 128))]
    for q, scale in found:
        assert bool(scale.isfinite().all())
        assert bool((scale[[0, 2]] == 1).all())
        assert bool((q.float()[[0, 2]] == 0).all())
        assert bool((q.float()[1] == 448).all())


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("is_per_tensor", [False, True])
def test_products_of_tokens_and_channels(num_tokens: int, rows: int, columns: int, is_per_tensor: bool) -> None:
    x, x_scale = quantize_per_token(random(num_tokens, columns, 1))
    weight, weight_scale = quantize_per_channel(random(rows, columns, 2))
    if is_per_tensor:
        x_scale, weight_scale = torch.tensor(0.03), torch.tensor([0.7])
    bias = torch.randn(rows)
    exact = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
    size = (x.double() * x_scale.double()).abs() @ (weight.double() * weight_scale.double()).abs().t()
    found = w8a8_matmul(x, x_scale, weight, weight_scale)
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= RELATIVE * size).all())
    with_bias = w8a8_matmul(x, x_scale, weight, weight_scale, bias)
    assert bool(((with_bias.double() - exact - bias).abs() <= RELATIVE * (size + bias.abs())).all())
    assert torch.equal(dequantize(weight, weight_scale).double(), (weight.float() * weight_scale).double())


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("block", [(128, 128), (16, 64)])
def test_products_of_groups_and_blocks(num_tokens: int, rows: int, columns: int, block: tuple[int, int]) -> None:
    x, x_scale = quantize_per_group(random(num_tokens, columns, 1), block[1])
    weight, weight_scale = quantize_blocks(random(rows, columns, 2), block)
    of_column = torch.arange(columns) // block[1]
    of_row = torch.arange(rows) // block[0]
    exact_x = x.double() * x_scale.double()[:, of_column]
    exact_weight = weight.double() * weight_scale.double()[of_row][:, of_column]
    exact, size = exact_x @ exact_weight.t(), exact_x.abs() @ exact_weight.abs().t()
    bias = torch.randn(rows)
    found = block_fp8_matmul(x, x_scale, weight, weight_scale, block, bias)
    assert bool(((found.double() - exact - bias).abs() <= RELATIVE * (size + bias.abs())).all())
    torch.testing.assert_close(dequantize(weight, weight_scale, block).double(), exact_weight, rtol=1e-7, atol=0)


def test_values_so_small_that_their_scale_underflows_are_no_nan() -> None:
    x = torch.full((2, 128), 1e-44)
    for q, scale in (quantize_per_token(x), quantize_per_group(x, 128), quantize_blocks(x, (128, 128))):
        assert bool((scale == 1).all())
        assert bool((q.float() == 0).all())
