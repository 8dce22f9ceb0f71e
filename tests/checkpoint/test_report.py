"""The load report: per kind of module, how it is stored, how many there are, and who decided it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.checkpoint.report import LoadReport, ModuleReport
from nextn.config.engine_config import EngineConfig
from nextn.execution.engine import Engine
from safetensors.torch import load_file

from tests.checkpoints import Quant, tiny_config, write_checkpoint

CONFIG = tiny_config()


def load(folder: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(folder), **options)
    return load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=None)


def report(folder: Path, **options: Any) -> LoadReport:
    return load(folder, **options).report


def by_kind(modules: tuple[ModuleReport, ...]) -> dict[str, ModuleReport]:
    found = {m.kind: m for m in modules}
    assert len(found) == len(modules), "every kind was decided alike in these checkpoints"
    return found


def test_every_kind_of_module_is_counted_with_its_scales_and_who_decided(tmp_path: Path) -> None:
    """3 layers, the first one dense, 8 experts, QK-norm; the NextN layer in BF16 by the ignore list."""
    found = report(write_checkpoint(tmp_path, CONFIG, quant="channel", draft="bf16_ignored", own_head=True))
    target = by_kind(found.target)
    by_config = "detected in config.json, group_0"
    fp8 = {
        "qkv_proj": (3, (128, 1)),
        "o_proj": (3, (48, 1)),
        "mlp.gate_up_proj": (1, (160, 1)),
        "mlp.down_proj": (1, (48, 1)),
        "experts.w13": (16, (48, 1)),
        "experts.w2": (16, (48, 1)),
        "shared_experts.gate_up_proj": (2, (48, 1)),
        "shared_experts.down_proj": (2, (48, 1)),
    }
    for kind, (count, shape) in fp8.items():
        assert target.pop(kind) == ModuleReport(kind, "fp8_channel", "float8_e4m3fn", shape, count, by_config)
    counts = {kind: (m.scheme, m.dtype, m.count) for kind, m in target.items()}
    assert counts == {
        "embed_tokens": ("unquantized", "bfloat16", 1),
        "norms": ("unquantized", "bfloat16", 13),
        "router gate": ("unquantized", "bfloat16", 2),
        "router bias": ("unquantized", "float32", 2),
        "lm_head": ("unquantized", "bfloat16", 1),
    }
    draft = by_kind(found.draft)
    assert draft["eh_proj"].source == "ignore entry 'model.layers.*.eh_proj'"
    assert draft["qkv_proj"].scheme == "unquantized"
    assert draft["qkv_proj"].source == "ignore entry 'model.layers.*.self_attn.q_proj'"
    assert draft["embed_tokens"].source.startswith("the target's")
    assert draft["lm_head"].source == "never quantized"


SOURCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "config": ({"quant": "channel"}, {}, "detected in config.json, group_0"),
    "block config": ({"quant": "block"}, {}, "detected in config.json"),
    "ignore entry": (
        {"quant": "channel", "draft": "bf16_ignored"},
        {},
        "ignore entry 'model.layers.*.self_attn.o_proj'",
    ),
    "pattern": ({"quant": "channel", "draft": "bf16_regex"}, {}, "ignore entry 're:model\\\\.layers\\\\.3\\\\..*'"),
    "prefix": ({"quant": "block", "draft": "bf16_ignored"}, {}, "modules_to_not_convert entry 'model.layers.3'"),
    "tensors": ({"quant": "channel", "draft": "bf16_no_scales"}, {}, "the tensors are BF16 without scales"),
    "nothing": ({}, {}, "no quantization config"),
    "flag": (
        {"quant": "channel"},
        {"draft_quantization": "compressed-tensors"},
        "--speculative-draft-model-quantization compressed-tensors",
    ),
    "unquant": (
        {"quant": "block"},
        {"draft_quantization": "unquant"},
        "--speculative-draft-model-quantization unquant: weight x scale on load",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_report_says_where_a_decision_came_from(name: str, tmp_path: Path) -> None:
    written, options, source = SOURCES[name]
    found = report(write_checkpoint(tmp_path, CONFIG, **written), **options)
    assert by_kind(found.draft)["o_proj"].source == source


HEADS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "FP8 layer": ({"quant": "channel"}, {}, True),
    "FP8 layer, by flag": ({"quant": "channel"}, {"draft_quantization": "compressed-tensors"}, True),
    "FP8 layer, head as stored": ({"quant": "block"}, {"draft_head": "stored"}, False),
    "FP8 layer, dequantized": ({"quant": "block"}, {"draft_quantization": "unquant"}, False),
    "FP8 layer, dequantized, head asked for": (
        {"quant": "block"},
        {"draft_quantization": "unquant", "draft_head": "fp8"},
        True,
    ),
    "BF16 layer of an FP8 checkpoint": ({"quant": "channel", "draft": "bf16_ignored"}, {}, False),
    "BF16": ({}, {}, False),
    "BF16, head asked for": ({}, {"draft_head": "fp8"}, True),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_drafts_read_the_head_as_fp8_where_the_layer_is(name: str, own: bool, tmp_path: Path) -> None:
    """Or where it is asked for. The target's stays as it is."""
    written, options, is_fp8 = HEADS[name]
    loaded = load(write_checkpoint(tmp_path, CONFIG, own_head=own, **written), **options)
    targets = load_file(tmp_path / "model.safetensors")["lm_head.weight"].float()
    stored = load_file(tmp_path / "mtp.safetensors")["model.layers.3.shared_head.head.weight"] if own else targets
    assert torch.equal(loaded.target.lm_head.weight, targets)
    assert loaded.draft is not None
    assert torch.equal(loaded.draft.head.weight, stored.float()) == (not is_fp8)
    torch.testing.assert_close(loaded.draft.head.weight, stored.float(), rtol=1 / 16, atol=1e-3)
    assert loaded.report.as_table().count("drafts read it as FP8") == is_fp8
    assert ("drafts read it as FP8" in by_kind(loaded.report.draft)["lm_head"].source) == is_fp8


def test_a_required_method_is_the_targets_source(tmp_path: Path) -> None:
    found = report(write_checkpoint(tmp_path, CONFIG, quant="block"), quantization="fp8")
    assert by_kind(found.target)["o_proj"].source == "--quantization fp8"
    assert by_kind(found.target)["norms"].source == "never quantized"


@pytest.mark.parametrize("quant", ["none", "channel", "block"])
def test_dummy_weights_are_reported_as_the_config_says(quant: Quant, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant)
    real = report(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    dummy = report(folder, load_format="dummy")
    assert dummy.draft_reason == real.draft_reason
    kinds = ("qkv_proj", "experts.w13", "mlp.down_proj")
    assert [by_kind(dummy.target)[k] for k in kinds] == [by_kind(real.target)[k] for k in kinds]


def test_the_engine_logs_it_a_row_at_a_time_and_answers_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant="channel")
    with caplog.at_level(logging.INFO):
        engine = Engine(EngineConfig(model_path=str(folder), max_running_requests=2))
    (event,) = [r.getMessage() for r in caplog.records if "draft experts.w13" in r.getMessage()]
    assert "detected in config.json, group_0" in event
    assert not any("\n" in r.getMessage() for r in caplog.records)
    answered = json.loads(json.dumps(engine.info()["load_report"]))
    assert answered["draft_reason"] == "compressed-tensors, as detected"
    rows = {m["kind"]: m for m in answered["draft"]}
    assert rows["experts.w2"] == {
        "kind": "experts.w2",
        "scheme": "fp8_channel",
        "dtype": "float8_e4m3fn",
        "scale_shape": [48, 1],
        "count": 8,
        "source": "detected in config.json, group_0",
    }
