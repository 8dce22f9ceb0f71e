"""Weights stream from the files: few are open at a time, whatever order the model asks in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from nextn.checkpoint.index import MAX_OPEN_FILES
from nextn.checkpoint.loader import load_model
from nextn.config.engine_config import EngineConfig
from safetensors.torch import load_file, save_file

from tests.checkpoints import tiny_config, write_checkpoint

NUM_FILES = 7


def _scattered(folder: Path) -> Path:
    """The checkpoint's tensors over many files, neighbours in different ones."""
    everything: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        everything |= load_file(file)
        file.unlink()
    weight_map = {}
    for i in range(NUM_FILES):
        name = f"model-{i:05}.safetensors"
        part = dict(list(everything.items())[i::NUM_FILES])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_two_files_are_open_at_most_and_each_once_per_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_checkpoint(tmp_path / "whole", tiny_config(), quant="channel")
    folder = _scattered(write_checkpoint(tmp_path / "scattered", tiny_config(), quant="channel"))
    opened: list[str] = []
    is_open: set[str] = set()
    most_open = 0

    class Counted:
        def __init__(self, file: Path, framework: str) -> None:
            self.name = file.name
            self.file = open_file(file, framework=framework)

        def __enter__(self) -> Any:
            nonlocal most_open
            opened.append(self.name)
            is_open.add(self.name)
            most_open = max(most_open, len(is_open))
            return self.file.__enter__()

        def __exit__(self, *error: Any) -> None:
            is_open.remove(self.name)
            self.file.__exit__(*error)

    open_file = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Counted)
    models = []
    for one in (whole, folder):
        opened.clear()
        config = EngineConfig(model_path=str(one))
        models.append(load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=True))
    assert len(set(opened)) == NUM_FILES
    assert len(opened) <= 2 * NUM_FILES, "once for the target, once for the draft"
    assert most_open <= MAX_OPEN_FILES == 2
    assert not is_open
    expected, found = ({slot.name: slot.view for slot in m.target.norm.weight_slots()} for m in models)
    assert torch.equal(found["model.norm.weight"], expected["model.norm.weight"])
