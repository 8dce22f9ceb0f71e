"""Norms, activations and quantization."""

from __future__ import annotations

from collections.abc import Iterator

from nextn.config.model_config import ModelConfig
from nextn.kernels.fp8_quantize import quantize_per_group, quantize_per_token
from nextn.kernels.moe_combine import ExpertTerms
from nextn.kernels.rms_norm import norm_quantize
from nextn.kernels.silu_mul import silu_mul, silu_mul_quantize

from tests.kernels.published.common import Call, of, scales


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    x, weight, gate_up = of(tokens, hidden), of(hidden), of(tokens, 2 * inner)
    top_k = config.num_experts_per_tok
    terms = ExpertTerms(of(tokens * (top_k + 1), hidden), scales(tokens, top_k), x)
    yield "norm", lambda: norm_quantize(x, weight, 1e-5, quantize=False)
    yield "norm of experts' terms", lambda: norm_quantize(terms, weight, 1e-5, quantize=False)
    yield "SwiGLU", lambda: silu_mul(gate_up)
    if not has_fp8_units:
        return
    for size in (None, 128):
        yield f"norm, quantize by {size}", lambda size=size: norm_quantize(x, weight, 1e-5, group_size=size)
        yield (
            f"add, norm, quantize by {size}",
            lambda size=size: norm_quantize(x, weight, 1e-5, residual=x, group_size=size),
        )
        yield (
            f"norm of experts' terms, quantize by {size}",
            lambda size=size: norm_quantize(terms, weight, 1e-5, group_size=size),
        )
        yield f"SwiGLU, quantize by {size}", lambda size=size: silu_mul_quantize(gate_up, size)
    attended = of(tokens, config.num_attention_heads * config.head_dim)
    yield "quantize per token", lambda: quantize_per_token(attended)
    yield "quantize per group", lambda: quantize_per_group(attended, 128)
