"""The doctor and the loader never disagree: the doctor makes the loader's own plan."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.checkpoint.plan import make_plan
from nextn.config.engine_config import EngineConfig
from nextn.diagnosis.checkup import Diagnosis, examine
from nextn.diagnosis.options import DoctorOptions
from nextn.diagnosis.show import show
from nextn.errors import NextnError, QuantizationError
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from rich.console import Console

from tests.broken_checkpoints import BROKEN
from tests.checkpoints import Draft, Quant, State, tiny_config, write_checkpoint

CONFIG = tiny_config()


def doctor(folder: Path, *, deep: bool = False, **server: str) -> Diagnosis:
    return examine(DoctorOptions(str(folder), server, deep))


def load(config: EngineConfig) -> LoadedModel:
    return load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=config.wants_draft)


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_loader_refuses_the_doctor_refuses_in_the_same_words(name: str, tmp_path: Path) -> None:
    folder = BROKEN[name].write(tmp_path)
    with pytest.raises(NextnError) as refusal:
        load(EngineConfig(model_path=str(folder)))
    deep, shallow = doctor(folder, deep=True), doctor(folder)
    assert (deep.exit_code, deep.refusal) == (2, str(refusal.value))
    assert shallow.serves == BROKEN[name].is_deep
    if not BROKEN[name].is_deep:
        assert shallow.refusal == deep.refusal


@pytest.mark.parametrize("name", BROKEN)
def test_whether_it_would_serve_without_drafts_agrees_too(name: str, tmp_path: Path) -> None:
    folder = BROKEN[name].write(tmp_path)
    try:
        load(EngineConfig(model_path=str(folder), num_draft_steps=0))
        loads = True
    except NextnError:
        loads = False
    assert doctor(folder, deep=True).serves_without_draft == loads
    assert doctor(folder, deep=True, speculative_algorithm="none").serves == loads


@pytest.mark.parametrize("quant", get_args(Quant))
@pytest.mark.parametrize("draft", [d for d in get_args(Draft) if d != "absent"])
@pytest.mark.parametrize("override", [None, "unquant", "compressed-tensors", "fp8"])
def test_verdict_and_report_agree_for_every_layout_and_override(
    quant: Quant, draft: Draft, override: str | None, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant, draft=draft, own_head=True)
    server = {"speculative_draft_model_quantization": override} if override else {}
    found = doctor(folder, deep=True, **server)
    config = EngineConfig(model_path=str(folder), draft_quantization=override)
    if not found.serves:
        with pytest.raises(NextnError) as refusal:
            load(config)
        assert found.refusal == str(refusal.value)
        return
    loaded = load(config)
    assert found.drafts
    assert found.report == loaded.report
    assert found.reason == loaded.report.draft_reason


def build_for_gpu(folder: Path) -> None:
    plan = make_plan(EngineConfig(model_path=str(folder)), want_draft=True)
    assert plan.draft is not None
    with torch.device("meta"):
        target = Glm4MoeForCausalLM(plan.source.config, plan.quantization, dtype=torch.bfloat16)
        Glm4MoeForCausalLMNextN(plan.draft.config, plan.draft.decision.config, target=target, dtype=torch.bfloat16)


def _down_in_bf16(layers: range) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        for name in [name for name in state if ".experts." in name and name.endswith("down_proj.weight")]:
            if int(name.split(".")[2]) in layers:
                state[name] = state[name].to(torch.bfloat16) * state.pop(f"{name}_scale").to(torch.bfloat16)

    return mutate


@pytest.mark.parametrize(
    ("quant", "mutate", "reason", "serves_without_draft"),
    [
        ("block", None, r"layers\.1\.mlp\.experts\.0\.gate_proj: has a scale per 16 columns", False),
        ("channel", _down_in_bf16(range(4)), r"layers\.1\.mlp\.experts\.0\.gate_proj: is fp8_channel and", False),
        ("channel", _down_in_bf16(range(3, 4)), r"layers\.3\.mlp\.experts\.0\.gate_proj: is fp8_channel and", True),
    ],
)
def test_what_every_gpu_refuses_the_doctor_refuses_in_the_same_words(
    quant: Quant, mutate: Callable[[State], None] | None, reason: str, serves_without_draft: bool, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant, mutate=mutate)
    with pytest.raises(QuantizationError, match=reason) as refusal:
        build_for_gpu(folder)
    found = doctor(folder)
    assert (found.exit_code, found.gpu_refusal) == (2, str(refusal.value))
    assert (found.serves, found.serves_without_draft) == (True, serves_without_draft)
    assert (found.memory, found.min_gpus) == ((), None)
    assert (found.command or "").endswith(" --device cpu")
    told = io.StringIO()
    show(found, Console(file=told, width=1000))
    assert f"refused on GPUs  the server would stop with this error:\n  {refusal.value}" in told.getvalue()
    assert "✓ serves on a CPU" in told.getvalue()
    expanded = doctor(folder, speculative_draft_model_quantization="unquant")
    assert (expanded.gpu_refusal is None) == serves_without_draft


def test_a_donor_is_judged_alike(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", tiny_config(num_nextn_predict_layers=0))
    fits = write_checkpoint(tmp_path / "fits", CONFIG, quant="channel")
    other = write_checkpoint(tmp_path / "other", tiny_config(hidden_size=64))
    cases: list[tuple[Path | None, int, str]] = [(None, 1, ""), (fits, 0, ""), (other, 2, "hidden_size: found 64")]
    for donor, code, message in cases:
        server: dict[str, Any] = {"speculative_draft_model_path": str(donor)} if donor else {}
        found = doctor(target, **server)
        assert found.exit_code == code
        assert message in (found.refusal or "")
