"""Linear layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.matmul import block_fp8_matmul, w8a8_matmul, wide_matmul
from nextn.kernels.matmul_config import MAX_TILES

from tests.kernels.published.common import Call, of, scales


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    hidden, heads, inner = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    counters = of(MAX_TILES, dtype=torch.int32)
    for case, n, k in (("qkv", qkv, hidden), ("o", hidden, heads), ("up", 2 * inner, hidden), ("down", hidden, inner)):
        x = of(tokens, k, dtype=FP8 if has_fp8_units else torch.bfloat16)
        per_token = scales(tokens, 1) if has_fp8_units else None
        per_group = scales(tokens, -(-k // 128)) if has_fp8_units else None
        per_row = per_group if case == "o" else per_token  # attention's heads have scales of their own
        weight, bias = of(n, k, dtype=FP8), of(n) if case == "qkv" else None
        residual = of(tokens, n) if case in ("o", "down") else None
        last = (bias, residual)
        out = {"out_dtype": torch.bfloat16, "counters": counters}
        for invariant in (False, True):
            yield (
                f"{case} per channel, batch_invariant {invariant}",
                lambda x=x, s=per_row, w=weight, last=last, n=n, invariant=invariant, out=out: w8a8_matmul(
                    x, s, w, scales(n, 1), *last, batch_invariant=invariant, **out
                ),
            )
        blocks = scales(-(-n // 128), -(-k // 128))
        yield (
            f"{case} per block",
            lambda x=x, s=per_group, w=weight, b=blocks, last=last, out=out: block_fp8_matmul(
                x, s, w, b, (128, 128), *last, **out
            ),
        )
    x, head = of(tokens, hidden), of(config.vocab_size, hidden)
    q, per_token = (of(tokens, hidden, dtype=FP8), scales(tokens, 1)) if has_fp8_units else (x, None)
    codes, steps = of(config.vocab_size, hidden, dtype=FP8), scales(config.vocab_size, 1)
    for invariant in (False, True):
        yield (
            f"head, batch_invariant {invariant}",
            lambda x=x, invariant=invariant: wide_matmul(x, head, out_dtype=torch.float32, batch_invariant=invariant),
        )
        yield (
            f"head for drafts, batch_invariant {invariant}",
            lambda q=q, per_token=per_token, invariant=invariant: w8a8_matmul(
                q, per_token, codes, steps, out_dtype=torch.float32, batch_invariant=invariant
            ),
        )
    narrow = of(hidden, hidden)
    yield "unquantized", lambda x=x: wide_matmul(x, narrow, counters=counters)
