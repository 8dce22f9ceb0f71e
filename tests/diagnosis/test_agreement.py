"""The doctor and the loader never disagree: the doctor makes the loader's own plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.diagnosis.checkup import Diagnosis, examine
from nextn.diagnosis.options import DoctorOptions
from nextn.errors import NextnError

from tests.broken_checkpoints import BROKEN
from tests.checkpoints import Draft, Quant, tiny_config, write_checkpoint

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
    assert (shallow.exit_code == 0) == BROKEN[name].is_deep
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
    assert doctor(folder, deep=True, speculative_algorithm="none").exit_code == (1 if loads else 2)


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
    if found.exit_code == 2:
        with pytest.raises(NextnError) as refusal:
            load(config)
        assert found.refusal == str(refusal.value)
        return
    loaded = load(config)
    assert (found.exit_code, found.drafts) == (0, True)
    assert found.report == loaded.report
    assert found.reason == loaded.report.draft_reason


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
