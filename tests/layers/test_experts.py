"""Experts that the kernels for GPUs do not take are refused when the model is built, before a weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nextn.config.model_config import ModelConfig
from nextn.errors import QuantizationError
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.quantization.compressed_tensors import CompressedTensorsConfig

from tests.checkpoints import quantization_config, tiny_config

CONFIG = tiny_config()


def build(device: str, *, block: tuple[int, int] = (16, 32), ignore: str | None = None) -> None:
    raw: Any = quantization_config("ct_block", CONFIG, "same")
    raw["config_groups"]["group_0"]["weights"]["block_structure"] = list(block)
    raw["ignore"] += [ignore] if ignore else []
    with torch.device(device):
        Glm4MoeForCausalLM(ModelConfig.from_dict(CONFIG), CompressedTensorsConfig.from_dict(raw, "config.json"))


@pytest.mark.parametrize("columns", [16, 48])
def test_blocks_of_a_width_that_gpus_do_not_take(columns: int) -> None:
    with pytest.raises(QuantizationError, match=rf"experts\.0\.gate_proj: has a scale per {columns} columns"):
        build("meta", block=(16, columns))
    build("cpu", block=(16, columns))


def test_two_matrices_that_are_stored_differently() -> None:
    ignore = r"re:.*experts\..*down_proj"
    with pytest.raises(QuantizationError, match=r"gate_proj: is fp8_block of 16 x 32 and .*down_proj is unquantized"):
        build("meta", ignore=ignore)
    build("cpu", ignore=ignore)
    build("meta")
