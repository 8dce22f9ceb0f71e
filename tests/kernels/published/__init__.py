"""What the published models ask of the kernels, as calls on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator

from nextn.config.model_config import ModelConfig

from tests.headers import published_config
from tests.kernels.published import attention, linears, moe, nextn, rows, sampling, step
from tests.kernels.published.common import MODELS, NUM_TOKENS, Call

PARTS = (attention, linears, moe, nextn, rows, sampling, step)


def all_launches(*, has_fp8_units: bool) -> Iterator[Call]:
    """(what for, call) for every kernel and shape. Without FP8 units activations stay wide."""
    for name in MODELS:
        config = ModelConfig.from_dict(published_config(name, "channel"))
        for tokens in NUM_TOKENS:
            for part in PARTS:
                for case, call in part.launches(config, tokens, has_fp8_units):
                    yield f"{name}, {tokens} tokens: {case}", call
