"""What a checkpoint declares: found wherever it stands, refused by name where it is not served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig as LibraryConfig
from nextn.checkpoint.plan import make_plan
from nextn.config.engine_config import EngineConfig
from nextn.errors import QuantizationError
from nextn.quantization.detect import detect_quantization
from nextn.quantization.names import match_entry, match_prefix
from nextn.quantization.scheme import QuantizationConfig

from tests.checkpoints import Quant, quantization_config, tiny_config, write_checkpoint

CONFIG = tiny_config()


def declared(quant: Quant, **changes: Any) -> dict[str, Any]:
    found = quantization_config(quant, CONFIG, "same")
    assert found is not None
    return {**found, **changes}


def detect(raw: dict[str, Any] | None, folder: Path = Path("nowhere")) -> QuantizationConfig | None:
    return detect_quantization(folder, raw)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_both_names_in_config_json_are_read(key: str, tmp_path: Path) -> None:
    from nextn.config.model_config import ModelConfig

    def rename(config: dict[str, Any]) -> None:
        config[key] = config.pop("quantization_config")

    folder = write_checkpoint(tmp_path, CONFIG, quant="channel", mutate_config=rename)
    found = detect_quantization(folder, ModelConfig.from_pretrained(folder).quantization_config)
    assert found is not None
    assert found.scheme_for(["model.layers.1.self_attn.o_proj"]).kind == "fp8_channel"


def test_hf_quant_config_json_is_read(tmp_path: Path) -> None:
    raw = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.3*"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(raw))
    found = detect(None, tmp_path)
    assert found is not None
    assert found.scheme_for(["model.layers.1.self_attn.o_proj"]).activation == "static_tensor"
    assert found.scheme_for(["model.layers.3.self_attn.o_proj"]).kind == "unquantized"


@pytest.mark.parametrize(
    ("algorithm", "quant", "kind", "activation"),
    [
        ("FP8", "tensor_static", "fp8_tensor", "static_tensor"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "channel", "fp8_channel", "dynamic_token"),
    ],
)
@pytest.mark.parametrize("field", ["ignore", "exclude_modules"])
def test_modelopt_in_config_json_is_served(
    field: str, algorithm: str, quant: Quant, kind: str, activation: str, tmp_path: Path
) -> None:
    number = {"dynamic": False, "num_bits": 8, "type": "float"}

    def exported(config: dict[str, Any]) -> None:
        config["quantization_config"] = {
            "config_groups": {"group_0": {"input_activations": number, "weights": number, "targets": ["Linear"]}},
            field: ["lm_head", "model.layers.*.mlp.gate", "model.layers.3.eh_proj"],
            "producer": {"name": "modelopt", "version": "0.39.0"},
            "quant_algo": algorithm,
            "quant_method": "modelopt",
        }

    folder = write_checkpoint(tmp_path, CONFIG, quant=quant, mutate_config=exported)
    plan = make_plan(EngineConfig(model_path=str(folder)), want_draft=True)
    assert plan.draft is not None
    for layout in (plan.layout, plan.draft.layout):
        schemes = [linear.scheme for linear in layout.linears if linear.kind == "experts.w2"]
        assert {(scheme.kind, scheme.activation) for scheme in schemes} == {(kind, activation)}


def test_nothing_declared_is_unquantized(tmp_path: Path) -> None:
    assert detect(None, tmp_path) is None


def test_our_reading_agrees_with_the_librarys_schema() -> None:
    for quant in ("channel", "tensor", "tensor_static"):
        raw = declared(quant)
        theirs = LibraryConfig.model_validate(raw).config_groups["group_0"]
        ours = detect(raw)
        assert ours is not None
        scheme = ours.scheme_for(["model.layers.1.self_attn.o_proj"])
        assert theirs.weights is not None
        assert theirs.input_activations is not None
        assert scheme.kind == f"fp8_{theirs.weights.strategy}"
        assert scheme.activation == ("dynamic_token" if theirs.input_activations.dynamic else "static_tensor")


@pytest.mark.parametrize("targets", [["Linear", "re:.*o_proj", "model.layers.1.self_attn.o_proj"], ["Linear"]])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_name_counts_for_more_than_a_pattern_and_that_for_more_than_the_class(
    targets: list[str], is_reversed: bool
) -> None:
    raw = declared("channel")
    group = raw["config_groups"]["group_0"]
    strategies = {"Linear": "channel", "re:.*o_proj": "block", "model.layers.1.self_attn.o_proj": "tensor"}
    raw["config_groups"] = {
        target: {
            "targets": [target],
            "weights": {**group["weights"], "strategy": strategies[target], "block_structure": [16, 16]},
            "input_activations": None,
        }
        for target in (reversed(targets) if is_reversed else targets)
    }
    found = detect(raw)
    assert found is not None
    kinds = [found.scheme_for([f"model.layers.{i}.self_attn.{part}_proj"]).kind for i, part in ((1, "o"), (2, "o"))]
    assert kinds == (["fp8_tensor", "fp8_block"] if len(targets) == 3 else ["fp8_channel", "fp8_channel"])
    assert found.scheme_for(["model.layers.1.self_attn.q_proj"]).kind == "fp8_channel"


def _grouped(form: str, of_group: str | None) -> dict[str, Any]:
    raw = declared("channel", format=form)
    raw["config_groups"]["group_0"]["format"] = of_group
    return raw


@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_groups_with_formats_of_their_own_are_served(form: str) -> None:
    found = detect(_grouped("mixed-precision", form))
    assert found is not None
    assert found.scheme_for(["model.layers.1.self_attn.o_proj"]).kind == "fp8_channel"


def _weights(**changes: Any) -> dict[str, Any]:
    raw = declared("channel")
    raw["config_groups"]["group_0"]["weights"].update(changes)
    return raw


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, "awq"),
    "gptq": ({"quant_method": "gptq"}, "gptq"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "int8": (_weights(type="int"), "'type': 'int'"),
    "four bits": (_weights(num_bits=4), "'num_bits': 4"),
    "groups": (_weights(strategy="group"), "'strategy': 'group'"),
    "asymmetric": (_weights(symmetric=False), "symmetric"),
    "packed": (declared("channel", format="pack-quantized"), "pack-quantized"),
    "a packed group": (_grouped("mixed-precision", "pack-quantized"), r"group_0\.format: found 'pack-quantized'"),
    "a packed group under another": (_grouped("float-quantized", "pack-quantized"), r"group_0\.format: found 'pack-"),
    "a group without a format": (_grouped("mixed-precision", None), r"group_0\.format: found 'mixed-precision'"),
    "nvfp4": (declared("channel", format="nvfp4-pack-quantized"), "nvfp4"),
    "rotated weights": (declared("channel", transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    "quantized KV": (declared("channel", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "e5m2": (declared("block", fmt="e5m2"), "e5m2"),
    "static blocks": (declared("block", activation_scheme="static"), "static"),
    "modelopt fp4": ({"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
    "modelopt fp4 in config.json": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "modelopt with quantized KV": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_methods_are_refused_by_name(name: str) -> None:
    raw, found = UNSUPPORTED[name]
    with pytest.raises(QuantizationError, match=found):
        detect(raw)


def test_shards_of_a_fused_module_must_agree() -> None:
    raw = declared("channel")
    raw["ignore"].append("model.layers.1.self_attn.k_proj")
    found = detect(raw)
    assert found is not None
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    with pytest.raises(QuantizationError, match=r"q_proj is fp8_channel .* but .*k_proj is unquantized"):
        found.scheme_for(names)


def test_entries_match_checkpoint_names_exactly_or_by_pattern() -> None:
    name = "model.layers.92.mlp.experts.3.up_proj"
    assert match_entry(name, ["model.layers.9", "re:.*mlp.experts"]) == "re:.*mlp.experts"
    assert match_entry(name, ["layers.92.mlp.experts.3.up_proj", "model.layers.92.mlp"]) is None
    assert match_prefix(name, ["model.layers.9", "model.layers.92.mlp"]) == "model.layers.92.mlp"
    with pytest.raises(QuantizationError, match="no regular expression"):
        match_entry(name, ["re:("])
