"""Each rank reads its own part of a checkpoint, and all parts together are the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint import loader
from nextn.checkpoint.index import TensorReader
from nextn.checkpoint.layout import ExpectedTensor
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import TensorParallel
from nextn.errors import ConfigError
from nextn.layers.storage import WHOLE, Part

from tests.checkpoints import tiny_config, write_checkpoint


def load(folder: Path, rank: int = 0, size: int = 1, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(folder), **options)
    tp = TensorParallel(rank, size)
    return load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=None, tp=tp)


def values(loaded: LoadedModel) -> dict[str, tuple[torch.Tensor, Any]]:
    """Per checkpoint tensor what the model computes with, and which part it is."""
    models = [model for model in (loaded.target, loaded.draft) if model is not None]
    return {name: (view, part) for model in models for name, view, part in model.weight_slots()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("override", [None, "unquant"])
@pytest.mark.parametrize("quant", ["none", "channel", "tensor", "tensor_static", "block", "ct_block"])
def test_the_parts_of_all_ranks_are_the_whole(folder: Path, quant: Any, size: int, override: str | None) -> None:
    """Weights are compared with their scales applied, so a scale of a neighbour's block would show."""
    sizes = {"moe_intermediate_size": 72, "intermediate_size": 88, "n_shared_experts": 2, "vocab_size": 27}
    write_checkpoint(folder, tiny_config(**sizes), quant=quant, own_head=True)
    whole = {name: view for name, (view, _) in values(load(folder, draft_quantization=override)).items()}
    seen = dict.fromkeys(whole, 0)
    for rank in range(size):
        for name, (view, part) in values(load(folder, rank, size, draft_quantization=override)).items():
            torch.testing.assert_close(view, part.of(whole[name]), rtol=0, atol=0, msg=f"{name} on rank {rank}")
            seen[name] += view.numel()
    repeated = {2: 1, 4: 2}[size]  # of two KV heads, each is on two of four ranks
    for name, count in seen.items():
        is_cut = ("_proj." in name and "eh_proj" not in name) or name.endswith("head.weight")
        times = repeated if ".k_proj." in name or ".v_proj." in name else 1 if is_cut else size
        assert count == times * whole[name].numel(), name


def test_only_the_ranks_part_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(moe_intermediate_size=32, intermediate_size=96)
    write_checkpoint(folder, config, quant="block")
    num_read: list[int] = []
    read = loader._read

    def noting(tensor: ExpectedTensor, reader: TensorReader, part: Part = WHOLE) -> torch.Tensor:
        found = read(tensor, reader, part)
        num_read[-1] += found.numel()
        return found

    monkeypatch.setattr(loader, "_read", noting)
    for size in (1, 2):
        num_read.append(0)
        loaded = load(folder, 0, size)
    held_by_all = sum(view.numel() for view, part in values(loaded).values() if part == WHOLE)
    assert num_read[1] - held_by_all == (num_read[0] - held_by_all) / 2


def test_dummy_weights_are_the_same_on_all_ranks_where_all_hold_them_and_differ_elsewhere(folder: Path) -> None:
    write_checkpoint(folder, tiny_config(moe_intermediate_size=32), quant="channel")
    first, second = (values(load(folder, rank, 2, load_format="dummy")) for rank in range(2))
    for name, (view, part) in first.items():
        assert torch.equal(view, second[name][0]) == (part == second[name][1]), name


def test_what_cannot_be_cut_is_refused_with_its_sizes(folder: Path) -> None:
    write_checkpoint(folder, tiny_config(num_attention_heads=8, head_dim=8, num_key_value_heads=8), quant="block")
    message = r"--tp-size 8: .*self_attn.q_proj: a rank's 1 heads of 8 are no multiple of its FP8 blocks of 16"
    with pytest.raises(ConfigError, match=message):
        load(folder, 0, 8)


def test_experts_of_fewer_blocks_than_ranks_are_refused(folder: Path) -> None:
    write_checkpoint(folder, tiny_config(intermediate_size=256), quant="block")
    with pytest.raises(ConfigError, match=r"--tp-size 4: .*experts: intermediate size: 24 .*--tp-size 2 or less"):
        load(folder, 0, 4)
