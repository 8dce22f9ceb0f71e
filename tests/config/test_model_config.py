"""config.json → ModelConfig: the published models' values, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nextn.config.model_config import ModelConfig
from nextn.errors import ConfigError

from tests.headers import published_config

PUBLISHED: dict[str, dict[str, Any]] = {
    "glm-4.5": {"hidden_size": 5120, "num_hidden_layers": 92, "max_position_embeddings": 131072},
    "glm-4.5-air": {"hidden_size": 4096, "num_hidden_layers": 46, "max_position_embeddings": 131072},
    "glm-4.6": {"hidden_size": 5120, "num_hidden_layers": 92, "max_position_embeddings": 202752},
}
LARGE = {
    "intermediate_size": 12288,
    "first_k_dense_replace": 3,
    "n_routed_experts": 160,
    "moe_intermediate_size": 1536,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
AIR = {
    "intermediate_size": 10944,
    "first_k_dense_replace": 1,
    "n_routed_experts": 128,
    "moe_intermediate_size": 1408,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
COMMON = {
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151552,
    "rms_norm_eps": 1e-5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 64,
    "rope_theta": 1e6,
    "eos_token_ids": (151329, 151336, 151338),
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("quant", ["none", "channel", "block"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_are_read_as_they_are(name: str, quant: str) -> None:
    raw = published_config(name, quant)
    config = ModelConfig.from_dict(raw)
    expected = {**COMMON, **(AIR if name == "glm-4.5-air" else LARGE), **PUBLISHED[name]}
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.quantization_config == raw.get("quantization_config")
    dense = [layer for layer in range(config.num_hidden_layers + 1) if config.is_dense(layer)]
    assert dense == list(range(config.first_k_dense_replace))


def changed(**values: Any) -> dict[str, Any]:
    """GLM-4.6's values with others; None leaves a field out."""
    return {k: v for k, v in {**published_config("glm-4.6"), **values}.items() if v is not None}


def test_theta_is_read_from_either_place_and_never_guessed() -> None:
    nested = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.25}
    config = ModelConfig.from_dict(changed(rope_theta=None, partial_rotary_factor=None, rope_parameters=nested))
    assert (config.rope_theta, config.rotary_dim) == (5e5, 32)
    with pytest.raises(ConfigError, match=r"rope_theta: found 1000000, and 500000\.0 in rope_parameters"):
        ModelConfig.from_dict(changed(partial_rotary_factor=None, rope_parameters=nested))
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        ModelConfig.from_dict(changed(rope_theta=None))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_has_two_names(name: str) -> None:
    fields: dict[str, Any] = {"dtype": None, "torch_dtype": None, name: "float16"}
    assert ModelConfig.from_dict(changed(**fields)).dtype == "float16"


def test_quantization_has_two_names() -> None:
    section = {"quant_method": "compressed-tensors"}
    assert ModelConfig.from_dict(changed(compression_config=section)).quantization_config == section


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}, "Glm4ForCausalLM"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
        ({"architectures": None, "model_type": "glm4v_moe"}, "glm4v_moe"),
    ],
)
def test_another_architecture_is_refused_by_its_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"architecture {named} is not supported; expected Glm4MoeForCausalLM"):
        ModelConfig.from_dict(changed(**fields))


def test_no_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no architecture"):
        ModelConfig.from_dict(changed(architectures=None, model_type=None))


INTEGERS = [name for name, value in published_config("glm-4.6").items() if type(value) is int and "token" not in name]
BOOLEANS = [name for name, value in published_config("glm-4.6").items() if type(value) is bool]
REQUIRED = ["vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts", "norm_topk_prob", "attention_bias"]


@pytest.mark.parametrize("value", ["8", 0.5, True, -1, [8], {"a": 1}])
@pytest.mark.parametrize("name", [name for name in INTEGERS if name != "rope_theta"])
def test_a_count_that_is_none_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: found .*, expected a whole number of at least \d"):
        ModelConfig.from_dict(changed(**{name: value}))


@pytest.mark.parametrize("value", ["true", 1, 0, []])
@pytest.mark.parametrize("name", BOOLEANS)
def test_a_switch_that_is_none_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found .*, expected true or false"):
        ModelConfig.from_dict(changed(**{name: value}))


@pytest.mark.parametrize("value", ["1e6", 0, -1.0, float("nan"), float("inf"), True, 10**400])
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "routed_scaling_factor", "partial_rotary_factor"])
def test_a_number_that_is_none_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found .*, expected a number above 0"):
        ModelConfig.from_dict(changed(**{name: value}))


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        ModelConfig.from_dict(changed(**{name: None}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 7}, "num_attention_heads: found 96, expected a multiple of num_key_value_heads"),
        ({"n_group": 7}, "n_group: found 7, expected a divisor of n_routed_experts"),
        ({"topk_group": 2}, "topk_group: found 2, expected at most n_group"),
        ({"n_group": 80, "num_experts_per_tok": 3}, "num_experts_per_tok: found 3, expected at most 2"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5 of head_dim 128"),
        ({"partial_rotary_factor": 0.005}, "expected an even number from 2"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: found 2, expected 0 or 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected at most"),
        ({"head_dim": 10**400}, "head_dim: found 1000.*, expected at most"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings: found 1000000000000, expected at most"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func: found 'softmax', expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method: found 'greedy', expected 'noaux_tc'"),
        ({"sliding_window": 4096}, "sliding_window: found 4096, expected none"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window: found 4096, expected none"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling: found a factor of 4\.0 without a type, expected 'default'"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
            "rope_scaling: rope type 'yarn' is not supported",
        ),
        ({"torch_dtype": "int8"}, "dtype: found 'int8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id: found '</s>', expected a token id"),
        ({"architectures": "Glm4MoeForCausalLM"}, "architectures: found 'Glm4MoeForCausalLM'"),
        ({"rope_parameters": [1]}, "rope"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(changed(**fields))


def test_fields_that_say_what_is_served_anyway_are_accepted() -> None:
    fields = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "sliding_window": 4096,
        "use_sliding_window": False,
        "rope_scaling": {"rope_type": "default", "factor": 1.0},
    }
    assert ModelConfig.from_dict(changed(**fields)) == ModelConfig.from_dict(changed())
    nothing = dict.fromkeys(fields)
    assert ModelConfig.from_dict({**changed(), **nothing}) == ModelConfig.from_dict(changed())


def test_eos_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(eos_token_id=5)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == (5, 7)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '"a"'])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give a folder"):
        ModelConfig.from_pretrained(tmp_path)
