"""How many CPU threads torch gets."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nextn.config.model_config import ModelConfig

WORTH_SHARING_BYTES = 8 * 2**20
"""A weight below this size is multiplied in less time than waking a second thread takes."""


def set_num_threads(model_path: str, wanted: int | None) -> None:
    """Set torch's threads for this process: what is wanted, else one for a small model, else all cores."""
    if wanted is None:
        config = ModelConfig.from_pretrained(Path(model_path))
        largest = 4 * config.hidden_size * max(config.intermediate_size, config.num_attention_heads * config.head_dim)
        wanted = 1 if largest < WORTH_SHARING_BYTES else len(os.sched_getaffinity(0))
    torch.set_num_threads(wanted)
