"""The published models' shapes; in a rehearsal tiny ones."""

from __future__ import annotations

from typing import Any

from nextn.config.model_config import ModelConfig

from benchmarks.gpu.place import Place
from tests.checkpoints import tiny_config
from tests.headers import official_ignores, published_config


def raw_config(name: str, place: Place, num_layers: int | None = None) -> dict[str, Any]:
    """config.json of a model in FP8 with a scale per channel. num_layers: None leaves it as published."""
    config = published_config(name, "channel")
    if place.is_rehearsal:
        config = {**config, **tiny_config(), "quantization_config": config["quantization_config"]}
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    config["quantization_config"] = {**config["quantization_config"], "ignore": official_ignores(config)}
    return config


def config_of(name: str, place: Place, num_layers: int | None = None) -> ModelConfig:
    return ModelConfig.from_dict(raw_config(name, place, num_layers))
