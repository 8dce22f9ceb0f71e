"""The front of the NextN layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.matmul_config import MAX_TILES
from nextn.kernels.nextn_input import nextn_projection

from tests.kernels.published.common import Call, of, scales


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    hidden = config.hidden_size
    counters = of(MAX_TILES, dtype=torch.int32)
    inputs = (of(tokens, dtype=torch.int64), of(config.vocab_size, hidden), of(tokens, hidden), of(hidden), of(hidden))
    wide, codes = of(hidden, 2 * hidden), of(hidden, 2 * hidden, dtype=FP8)
    per_channel, blocks = scales(hidden, 1), scales(-(-hidden // 128), -(-2 * hidden // 128))
    yield "eh_proj", lambda: nextn_projection(*inputs, 1e-5, wide, counters=counters)
    yield "eh_proj, batch_invariant", lambda: nextn_projection(*inputs, 1e-5, wide, batch_invariant=True)
    yield "eh_proj per channel", lambda: nextn_projection(*inputs, 1e-5, codes, per_channel, counters=counters)
    yield (
        "eh_proj per block",
        lambda: nextn_projection(*inputs, 1e-5, codes, blocks, (128, 128), counters=counters),
    )
