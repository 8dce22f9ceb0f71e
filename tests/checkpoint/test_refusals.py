"""A checkpoint that does not fit is refused, and the message names the tensor or the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from nextn.checkpoint.hub import resolve_model
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.diagnosis.checkup import examine
from nextn.diagnosis.options import DoctorOptions
from nextn.errors import CheckpointError, ConfigError, NextnError, QuantizationError
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache

from tests.broken_checkpoints import BROKEN
from tests.checkpoints import Quant, State, tiny_config, write_checkpoint

CONFIG = tiny_config()
CPU = torch.device("cpu")


def load(folder: Path, *, want_draft: bool | None = None, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(folder), **options)
    return load_model(config, device=CPU, dtype=torch.float32, want_draft=want_draft)


def test_a_file_that_the_index_leaves_out_is_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant="channel", in_index=False)
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.startswith("model.layers.3.") for name in listed)
    assert load(folder).draft is not None


def test_one_file_without_an_index_is_enough(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, mtp_file=False)
    (folder / "model.safetensors.index.json").unlink()
    assert load(folder).draft is not None


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(NextnError, match=BROKEN[name].message):
        load(BROKEN[name].write(tmp_path))


@pytest.mark.parametrize("quant", get_args(Quant))
@pytest.mark.parametrize("file", ["model", "mtp"])
def test_a_file_that_ends_in_zeros_is_refused(quant: Quant, file: str, tmp_path: Path) -> None:
    """As an interrupted download leaves it where the space was taken beforehand: header, size and scales are right."""
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant)
    path = folder / f"{file}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: 9 * len(whole) // 10].ljust(len(whole), b"\0"))
    with pytest.raises(CheckpointError, match="nothing but zeros"):
        load(folder)
    assert examine(DoctorOptions(str(folder), {}, deep=True)).exit_code == 2


@pytest.mark.parametrize(
    ("quant", "code"), [("none", 0x7FC0), ("none", 0xFF80), ("channel", 0x7F), ("block", 0xFF), ("channel", 0xFF)]
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.gate_proj", "model.layers.3.self_attn.k_proj"])
def test_one_weight_that_is_no_number_is_enough(quant: Quant, code: int, name: str, tmp_path: Path) -> None:
    def spoil(state: State) -> None:
        weight = state[f"{name}.weight"]
        weight.view(torch.uint8 if weight.itemsize == 1 else torch.uint16)[-1, -1] = code

    with pytest.raises(CheckpointError, match=rf"{name}\.weight: holds (nan|-inf), expected finite numbers"):
        load(write_checkpoint(tmp_path, CONFIG, quant=quant, mutate=spoil))


def test_biases_may_be_zero(tmp_path: Path) -> None:
    def clear(state: State) -> None:
        for name in [name for name in state if name.endswith("bias")]:
            state[name] = torch.zeros_like(state[name])

    assert load(write_checkpoint(tmp_path, CONFIG, mutate=clear)).draft is not None


@pytest.mark.parametrize(
    "name", ["mtp.safetensors", "model.safetensors.index.json", "generation_config.json", "hf_quant_config.json"]
)
def test_a_link_to_nothing_is_not_taken_for_no_file(name: str, tmp_path: Path) -> None:
    """As the hub's cache is where a download has not ended, or a blob was removed."""
    folder = write_checkpoint(tmp_path, CONFIG)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(
        NextnError, match=rf"{name}:? (is a link to ../blobs/gone, which does not exist|cannot be read)"
    ):
        load(folder)


def test_a_file_that_aria2_has_not_ended_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    (folder / "mtp.safetensors.aria2").touch()
    with pytest.raises(
        CheckpointError, match=r"mtp\.safetensors: its download has not ended, as mtp\.safetensors\.aria2"
    ):
        load(folder)


def test_a_file_manager_s_own_files_are_no_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7" * 100)
    assert load(folder).draft is not None


class _Bomb:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIG)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(_Bomb(tmp_path / "marker"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle format \(pytorch_model\.bin\)"):
        load(folder)
    assert not (tmp_path / "marker").exists()


def test_remote_code_is_never_imported(tmp_path: Path) -> None:
    def add_code(config: dict[str, Any]) -> None:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}

    folder = write_checkpoint(tmp_path / "model", CONFIG, mutate_config=add_code)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    assert load(folder).draft is not None
    assert not (tmp_path / "marker").exists()


def test_an_absent_nextn_layer_is_no_matter_without_drafts(tmp_path: Path) -> None:
    assert load(write_checkpoint(tmp_path, CONFIG, draft="absent"), want_draft=False).draft is None


def test_drafting_without_a_nextn_layer_is_refused_only_when_asked_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=0))
    assert load(folder).draft is None
    with pytest.raises(CheckpointError, match="names no NextN layer"):
        load(folder, want_draft=True)


def test_without_drafts_the_nextn_layer_is_not_read(tmp_path: Path) -> None:
    def spoil(state: State) -> None:
        state["model.layers.3.enorm.weight"] = torch.zeros(1)

    folder = write_checkpoint(tmp_path, CONFIG, quant="channel", mutate=spoil)
    assert load(folder, want_draft=False).draft is None
    with pytest.raises(CheckpointError, match="enorm"):
        load(folder)


def test_a_context_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    """Its rotary table ends there."""
    folder = write_checkpoint(tmp_path, tiny_config(max_position_embeddings=64))
    with pytest.raises(ConfigError, match=r"--context-length: found 65, expected at most 64"):
        load(folder, context_length=65)
    assert load(folder, context_length=64).draft is not None


def test_a_wanted_method_must_be_the_checkpoints(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant="channel")
    assert load(folder, quantization="compressed-tensors").draft is not None
    with pytest.raises(QuantizationError, match="--quantization fp8: the checkpoint is compressed-tensors"):
        load(folder, quantization="fp8")


@pytest.mark.parametrize(
    ("quant", "method", "other"),
    [("channel", "compressed-tensors", "fp8"), ("tensor_static", "fp8", None), ("tensor", "compressed-tensors", None)],
)
def test_a_wanted_method_is_that_of_weights_which_nothing_declares(
    quant: Quant, method: str, other: str | None, tmp_path: Path
) -> None:
    declared = write_checkpoint(tmp_path / "declared", CONFIG, quant=quant)
    folder = write_checkpoint(
        tmp_path / "undeclared", CONFIG, quant=quant, mutate_config=lambda config: config.pop("quantization_config")
    )
    loaded, expected = load(folder, quantization=method), load(declared)
    assert loaded.draft is not None
    assert expected.draft is not None
    for one, same in ((loaded.target.layers[1], expected.target.layers[1]), (loaded.draft.block, expected.draft.block)):
        torch.testing.assert_close(one.mlp.experts.w2, same.mlp.experts.w2, rtol=1e-6, atol=0)
    with pytest.raises(QuantizationError, match=r"declared unq.* in config\.json.*, or pass --quantization comp"):
        load(folder)
    if other is not None:
        with pytest.raises(QuantizationError, match=f"pass {method}, which config.json leaves out"):
            load(folder, quantization=other)


def test_a_wanted_method_does_not_stand_for_scales(tmp_path: Path) -> None:
    def no_scales(state: State) -> None:
        for name in [name for name in state if name.endswith("_scale")]:
            del state[name]

    folder = write_checkpoint(
        tmp_path,
        CONFIG,
        quant="channel",
        mutate=no_scales,
        mutate_config=lambda config: config.pop("quantization_config"),
    )
    with pytest.raises(QuantizationError, match="--quantization fp8: the checkpoint has float8_e4m3fn weights without"):
        load(folder, quantization="fp8")
    with pytest.raises(QuantizationError, match=r"garbage: declare them in config\.json's quantization_config$"):
        load(folder)


@pytest.mark.parametrize("name", ["./no/such/folder", "nowhere", "a/b/c", "/not/here"])
def test_a_name_that_is_neither_folder_nor_hub_name_says_so(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_an_unreachable_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="owner/name: no such folder"):
        resolve_model("owner/name")


@pytest.mark.parametrize("quant", ["none", "channel", "tensor_static", "block"])
def test_dummy_weights_need_only_a_config(quant: Quant, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    first, second = (load(folder, load_format="dummy", random_seed=3) for _ in range(2))
    assert first.draft is not None
    shape = (4, 1, 16, 2, 16)
    batch = make_extend_batch([(0, 10)], [[0]], 16, CPU)
    logits = [
        loaded.target.compute_logits(
            loaded.target.forward(torch.arange(10), batch, KVCache(torch.zeros(shape), torch.zeros(shape)))
        )
        for loaded in (first, second)
    ]
    assert torch.isfinite(logits[0]).all()
    assert logits[0].std() > 0.1
    assert torch.equal(logits[0], logits[1])


def test_every_error_of_loading_is_one_a_user_can_act_on(tmp_path: Path) -> None:
    with pytest.raises(NextnError, match=r"config\.json does not exist"):
        load(tmp_path)
