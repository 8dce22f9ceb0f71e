"""Names and numbers survive the way into the files and back."""

import pytest
import torch
from nextn.demo.quantize import (
    compress,
    decompress,
    dequantize_channels,
    fuse_experts,
    is_quantized,
    module_names,
    nextn_names,
    quantize_channels,
    split_experts,
)


def test_round_trip_is_within_the_error_of_e4m3():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_channels(weight)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (64, 1)
    # 3 mantissa bits: a relative error of at most 2^-4, and below the smallest normal 2^-6 an absolute one of 2^-10
    error = (dequantize_channels(codes, scale) - weight).abs()
    assert torch.all(error <= torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * 1.001)


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantize_channels(torch.zeros(2, 8))
    assert torch.equal(dequantize_channels(codes, scale), torch.zeros(2, 8))


def test_quantizing_twice_changes_nothing():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    once = dequantize_channels(*quantize_channels(weight))
    assert torch.allclose(dequantize_channels(*quantize_channels(once)), once, rtol=1e-6, atol=0)


def test_experts_are_split_gate_first_and_fused_back():
    prefix = "model.layers.1.mlp.experts"
    fused = {f"{prefix}.gate_up_proj": torch.randn(3, 8, 6), f"{prefix}.down_proj": torch.randn(3, 6, 4)}
    split = split_experts(fused)
    assert torch.equal(split[f"{prefix}.2.gate_proj.weight"], fused[f"{prefix}.gate_up_proj"][2, :4])
    assert torch.equal(split[f"{prefix}.2.up_proj.weight"], fused[f"{prefix}.gate_up_proj"][2, 4:])
    assert torch.equal(split[f"{prefix}.0.down_proj.weight"], fused[f"{prefix}.down_proj"][0])
    back = fuse_experts(split)
    assert back.keys() == fused.keys()
    assert all(torch.equal(back[name], fused[name]) for name in fused)


def test_nextn_names_are_those_of_layer_n_and_come_back():
    own = ["eh_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight", "layer.self_attn.q_proj.weight"]
    tensors = {name: torch.zeros(1) for name in own}
    named = nextn_names(tensors, 5)
    assert set(named) == {
        "model.layers.5.eh_proj.weight", "model.layers.5.enorm.weight", "model.layers.5.hnorm.weight",
        "model.layers.5.shared_head.norm.weight", "model.layers.5.self_attn.q_proj.weight",
    }  # fmt: skip
    assert module_names(named, 5).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.1.mlp.experts.7.down_proj.weight", True),
        ("model.layers.5.mlp.shared_experts.up_proj.weight", True),
        ("model.layers.5.self_attn.o_proj.weight", True),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.5.eh_proj.weight", False),
        ("model.layers.1.self_attn.q_proj.bias", False),
        ("lm_head.weight", False),
    ],
)
def test_which_tensors_are_fp8(name, expected):
    assert is_quantized(name) == expected


def test_compressing_keeps_float32_where_it_must():
    tensors = {
        "model.layers.1.mlp.gate.weight": torch.randn(4, 8),
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.randn(4),
        "model.layers.1.self_attn.q_proj.weight": torch.randn(8, 8),
    }
    stored = compress(tensors)
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.layers.1.self_attn.q_proj.weight_scale"].dtype == torch.float32
    assert decompress(stored).keys() == tensors.keys()
