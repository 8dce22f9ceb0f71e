"""A checkpoint that does not fit is refused, and the message names the tensor or the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint.hub import resolve_model
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.errors import CheckpointError, NextnError, QuantizationError
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from safetensors.torch import load_file, save_file

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


O_PROJ = "model.layers.1.self_attn.o_proj"


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        state[name] = change(state[name])

    return mutate


def _drop(part: str) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return mutate


def _with(first: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        changed = scale.clone()
        changed.view(-1)[0] = first
        return changed

    return change


MUTATIONS: dict[str, tuple[Quant, Callable[[State], None], str]] = {
    "missing": ("none", _drop(f"{O_PROJ}.weight"), f"{O_PROJ}.weight is missing"),
    "several missing": (
        "none",
        _drop(".mlp.experts.5."),
        r"experts\.5\..*\(6 tensors\) are missing",
    ),
    "unread": ("none", lambda s: s.update({f"{O_PROJ}.bias": torch.zeros(3)}), f"{O_PROJ}.bias is in the checkpoint"),
    "unread scale": (
        "channel",
        lambda s: s.update({f"{O_PROJ}.k_scale": torch.ones(1)}),
        f"{O_PROJ}.k_scale is in the checkpoint",
    ),
    "wrong shape": ("none", _set(f"{O_PROJ}.weight", lambda t: t[:-1]), rf"{O_PROJ}\.weight: found shape \(47, 64\)"),
    "wrong scale shape": ("channel", _set(f"{O_PROJ}.weight_scale", lambda t: t[:-1]), "weight_scale: found shape"),
    "scale of zero": ("channel", _set(f"{O_PROJ}.weight_scale", _with(0.0)), f"{O_PROJ}.weight_scale: holds a scale"),
    "negative scale": ("channel", _set(f"{O_PROJ}.weight_scale", _with(-1.0)), "weight_scale: holds a scale"),
    "NaN scale": ("block", _set(f"{O_PROJ}.weight_scale_inv", _with(float("nan"))), "weight_scale_inv: holds a scale"),
    "infinite scale": ("tensor", _set(f"{O_PROJ}.weight_scale", _with(float("inf"))), "weight_scale: holds a scale"),
    "codes in a norm": (
        "none",
        _set("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        r"model\.norm\.weight: found torch\.float8_e4m3fn",
    ),
    "integers": (
        "none",
        _set("model.norm.weight", lambda t: t.to(torch.int64)),
        r"model\.norm\.weight: found torch\.int64",
    ),
    "codes without config": (
        "none",
        _set(f"{O_PROJ}.weight", lambda t: t.to(torch.float8_e4m3fn)),
        rf"{O_PROJ}\.weight: holds float8_e4m3fn codes",
    ),
    "the other FP8": (
        "channel",
        _set(f"{O_PROJ}.weight", lambda t: t.float().to(torch.float8_e5m2)),
        rf"{O_PROJ}\.weight: found F8_E5M2",
    ),
    "draft tensor missing": (
        "channel",
        _drop("model.layers.3.hnorm.weight"),
        r"model\.layers\.3\.hnorm\.weight is missing",
    ),
    "eh_proj of the wrong width": (
        "none",
        _set("model.layers.3.eh_proj.weight", lambda t: t[:, :48]),
        r"model\.layers\.3\.eh_proj\.weight: found shape \(48, 48\), expected \(48, 96\)",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_tensors_that_do_not_fit_are_named(name: str, tmp_path: Path) -> None:
    quant, mutate, message = MUTATIONS[name]
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(tmp_path, CONFIG, quant=quant, mutate=mutate))


def test_a_tensor_in_two_files_is_refused_naming_both(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    save_file({"model.norm.weight": torch.ones(48)}, folder / "extra.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight: is in both extra\.safetensors and model\.safetensors"
    ):
        load(folder)


def test_truncated_and_corrupt_files_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    file = folder / "mtp.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-10], whole[:100], whole[:4], b"", b"x" * 500, whole + b"more"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"mtp\.safetensors"):
            CheckpointIndex.open(folder)


def _edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


INDEX_EDITS: dict[str, tuple[Callable[[dict[str, str]], None], str]] = {
    "missing file": (lambda m: m.update({"a": "model-00002.safetensors"}), "names model-00002.safetensors"),
    "missing tensor": (lambda m: m.update({"a.weight": "model.safetensors"}), "a.weight: listed in"),
    "other file": (lambda m: m.update({"model.norm.weight": "mtp.safetensors"}), "says mtp.safetensors, but it is in"),
    "a path": (lambda m: m.update({"a": "../model.safetensors"}), "expected tensor names mapped to names of files"),
}


@pytest.mark.parametrize("name", INDEX_EDITS)
def test_an_index_that_disagrees_with_the_files_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    edit, message = INDEX_EDITS[name]
    _edit_index(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_unreadable_index_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)


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


def test_a_named_but_absent_nextn_layer_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, draft="absent")
    with pytest.raises(
        CheckpointError, match=r"no file has a tensor model\.layers\.3\.\*.*--speculative-algorithm none"
    ):
        load(folder)
    assert load(folder, want_draft=False).draft is None


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


def test_the_nextn_layer_of_another_checkpoint_is_taken_if_it_fits(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", tiny_config(num_nextn_predict_layers=0), seed=1)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant="channel", seed=2)
    loaded = load(target, want_draft=True, draft_model_path=str(donor))
    assert loaded.draft is not None
    stored = load_file(donor / "mtp.safetensors")
    torch.testing.assert_close(loaded.draft.enorm.weight.data, stored["model.layers.3.enorm.weight"].float())
    assert loaded.draft.embed_tokens is loaded.target.embed_tokens
    other = write_checkpoint(tmp_path / "other", tiny_config(hidden_size=64))
    with pytest.raises(CheckpointError, match="hidden_size: found 64, expected 48"):
        load(target, want_draft=True, draft_model_path=str(other))


def test_a_wanted_method_must_be_the_checkpoints(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant="channel")
    assert load(folder, quantization="compressed-tensors").draft is not None
    with pytest.raises(QuantizationError, match="--quantization fp8: the checkpoint is compressed-tensors"):
        load(folder, quantization="fp8")


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


def test_the_load_report_says_what_was_decided_and_why(tmp_path: Path) -> None:
    loaded = load(write_checkpoint(tmp_path, CONFIG, quant="channel", draft="bf16_ignored"))
    kinds = {m.kind: m for m in loaded.report.target}
    assert (kinds["qkv_proj"].scheme, kinds["qkv_proj"].dtype, kinds["qkv_proj"].count) == (
        "fp8_channel",
        "float8_e4m3fn",
        3,
    )
    assert kinds["qkv_proj"].source == "detected in config.json, group_0"
    draft = {m.kind: m for m in loaded.report.draft}
    assert draft["qkv_proj"].scheme == "unquantized"
    assert "ignore entry" in draft["qkv_proj"].source
    assert json.loads(json.dumps(loaded.report.as_dict()))["draft_reason"] == loaded.report.draft_reason
    assert "experts.w13" in loaded.report.as_table()


def test_every_error_of_loading_is_one_a_user_can_act_on(tmp_path: Path) -> None:
    with pytest.raises(NextnError, match=r"config\.json does not exist"):
        load(tmp_path)
