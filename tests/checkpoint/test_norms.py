"""Norms stored shifted by one are told from norms that were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nextn import demo
from nextn.checkpoint.plan import check_values, make_plan
from nextn.checkpoint.values import check_norms, read_floats
from nextn.config.engine_config import EngineConfig
from nextn.errors import CheckpointError
from safetensors.torch import load_file

from tests.checkpoints import State, tiny_config, write_checkpoint


def _each_norm(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        for name in [name for name in state if name.endswith("norm.weight")]:
            state[name] = change(state[name].float()).to(state[name].dtype)

    return mutate


def check(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    write_checkpoint(folder, tiny_config(), mutate=_each_norm(change))
    check_values(make_plan(EngineConfig(model_path=str(folder)), want_draft=None))


TRAINED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as initialised": torch.ones_like,
    "small": lambda w: 0.03 * w,  # as the first layers of many models
    "small, some negative": lambda w: torch.where(torch.arange(len(w)) % 10 == 0, -0.02, 0.05 * w),
    "large": lambda w: 6 * w,
    "of both kinds": lambda w: w * torch.linspace(0.01, 3, len(w)),
}
SHIFTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as initialised": torch.zeros_like,
    "spread around 1": lambda w: w - 1,
    "shrunk": lambda w: 0.4 * w - 1,
    "grown a little": lambda w: w + 0.1 - 1,
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_norms_pass(name: str, tmp_path: Path) -> None:
    check(tmp_path, TRAINED[name])


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_norms_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stored shifted by one"):
        check(tmp_path, SHIFTED[name])


def test_one_odd_norm_among_many_is_no_proof(tmp_path: Path) -> None:
    def shift_one(state: State) -> None:
        state["model.layers.0.input_layernorm.weight"] -= 1

    folder = write_checkpoint(tmp_path, tiny_config(), mutate=shift_one)
    check_values(make_plan(EngineConfig(model_path=str(folder)), want_draft=None))


def test_the_trained_embedded_model_is_far_from_the_threshold() -> None:
    plan = make_plan(EngineConfig(model_path=str(demo.checkpoint_dir())), want_draft=True)
    assert plan.source.index is not None
    assert plan.draft is not None
    for layout in (plan.layout, plan.draft.layout):
        assert max(one.negative for one in check_norms(plan.source.index, layout)) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(), dtype=dtype)
    index = make_plan(EngineConfig(model_path=str(folder)), want_draft=True).source.index
    assert index is not None
    stored = {**load_file(folder / "model.safetensors"), **load_file(folder / "mtp.safetensors")}
    for name, values in read_floats(index, [name for name in stored if "norm" in name]):
        assert torch.equal(torch.from_numpy(values.astype("f8")), stored[name].double()), name
