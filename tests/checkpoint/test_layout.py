"""The layout says of every tensor what the models' storage says; official lists of excluded modules are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from nextn.checkpoint.ignores import check_ignores
from nextn.checkpoint.plan import make_plan
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.errors import QuantizationError
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.quantization.detect import detect_quantization

from tests.checkpoints import Quant, tiny_config, write_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "all on": {},
    "as Air": {"use_qk_norm": False, "first_k_dense_replace": 2, "moe_intermediate_size": 40},
    "tied, no shared experts, no bias": {"tie_word_embeddings": True, "n_shared_experts": 0, "attention_bias": False},
    "two shared experts": {"n_shared_experts": 2, "first_k_dense_replace": 0},
}


@pytest.mark.parametrize("quant", get_args(Quant))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [False, True])
def test_layout_and_model_agree_on_every_name_and_shape(shape: str, quant: Quant, own: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(**SHAPES[shape]), quant=quant, own_head=own, own_embedding=own)
    plan = make_plan(EngineConfig(model_path=str(folder)), want_draft=True)
    assert plan.draft is not None
    target = Glm4MoeForCausalLM(plan.source.config, plan.quantization)
    draft = Glm4MoeForCausalLMNextN(
        plan.draft.config,
        plan.draft.decision.config,
        target=target,
        has_own_head=plan.draft.has_own_head,
        has_own_embedding=plan.draft.has_own_embedding,
    )
    for model, layout in ((target, plan.layout), (draft, plan.draft.layout)):
        slots = {name: tuple(view.shape) for name, view, _ in model.weight_slots()}
        expected = {tensor.name: tensor.shape or (1,) for tensor in layout.tensors()}
        assert slots == expected


FIXTURE_LISTS = {
    "norms, gates and optional modules": [
        *("lm_head", "model.embed_tokens", "model.norm"),
        *(f"model.layers.{i}.{part}" for i in range(4) for part in ("input_layernorm", "mlp.gate", "self_attn.q_norm")),
        *(
            f"model.layers.3.{p}"
            for p in ("eh_proj", "embed_tokens", "enorm", "hnorm", "shared_head.norm", "shared_head.head")
        ),
    ],
    "prefixes": ["model.layers.3", "model.layers.1.mlp.experts", "model.layers.1.mlp.experts.4"],
    "patterns": [r"re:.*mlp\.gate$", r"re:.*lm_head", r"re:model\.layers\.3\..*", r"re:.*eh_proj"],
    "nothing": [],
}


def _config(entries: list[str], quant: Quant, **changes: Any) -> tuple[ModelConfig, dict[str, Any]]:
    raw = tiny_config(**changes)
    kind = "compressed-tensors" if quant == "channel" else "fp8"
    number = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    declared: dict[str, Any] = {"quant_method": kind, "ignore": entries, "modules_to_not_convert": entries}
    if quant == "channel":
        declared["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": number}}
    return ModelConfig.from_dict({**raw, "quantization_config": declared}), declared


@pytest.mark.parametrize("quant", ["channel", "block"])
@pytest.mark.parametrize("name", FIXTURE_LISTS)
def test_entries_of_official_kinds_are_accepted(name: str, quant: Quant) -> None:
    config, declared = _config(FIXTURE_LISTS[name], quant)
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    check_ignores(detect_quantization(Path("nowhere"), declared), config, names)


@pytest.mark.parametrize("quant", ["channel", "block"])
def test_entries_left_over_from_a_removed_nextn_layer_are_accepted(quant: Quant) -> None:
    entries = ["model.layers.3.eh_proj", "model.layers.3.mlp.experts.7.up_proj", "re:model.layers.3.*"]
    config, declared = _config(entries, quant, num_nextn_predict_layers=0)
    check_ignores(detect_quantization(Path("nowhere"), declared), config, ["lm_head.weight"])


@pytest.mark.parametrize("entry", ["gate", "eh_proj"])
def test_a_last_part_alone_names_something_in_the_fp8_format_only(entry: str) -> None:
    config, declared = _config([entry], "block")
    check_ignores(detect_quantization(Path("nowhere"), declared), config, [])
    config, declared = _config([entry], "channel")
    with pytest.raises(QuantizationError, match=f"ignore entry '{entry}' names no module"):
        check_ignores(detect_quantization(Path("nowhere"), declared), config, [])


def test_modelopts_wildcards_are_patterns(tmp_path: Path) -> None:
    raw = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*mlp.gate*", "model.layers.3*"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(raw))
    found = detect_quantization(tmp_path, None)
    config, _ = _config([], "block")
    check_ignores(found, config, [])
    raw["quantization"]["exclude_modules"] = ["model.layers.7*"]
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(raw))
    with pytest.raises(QuantizationError, match=r"hf_quant_config\.json: exclude_modules entry"):
        check_ignores(detect_quantization(tmp_path, None), config, [])


def test_the_plan_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(), quant="channel")
    monkeypatch.setattr(torch, "empty", None)
    assert make_plan(EngineConfig(model_path=str(folder)), want_draft=True).draft is not None
