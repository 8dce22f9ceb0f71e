"""How many CPU threads torch gets."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nextn.config.model_config import ModelConfig

WORTH_SHARING_BYTES = 8 * 2**20
"""A weight below this size is multiplied in less time than waking a second thread takes."""


def set_num_threads(model_path: str, wanted: int | None, num_sharing: int = 1) -> None:
    """Set torch's threads for this process: what is wanted, else one for a small model, else its share of all cores.

    num_sharing: processes like this one on the machine
    """
    if wanted is None:
        config = ModelConfig.from_pretrained(Path(model_path))
        largest = 4 * config.hidden_size * max(config.intermediate_size, config.num_attention_heads * config.head_dim)
        cores = len(os.sched_getaffinity(0))
        wanted = 1 if largest < WORTH_SHARING_BYTES else max(cores // num_sharing, 1)
    torch.set_num_threads(wanted)
