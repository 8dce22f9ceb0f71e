"""A NextN layer out of another checkpoint: taken with its own quantization where it fits, refused with both values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from nextn import LLM, SamplingParams, demo
from nextn.checkpoint.hub import resolved_config
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.config.server_args import ServerArgs
from nextn.errors import CheckpointError, QuantizationError
from safetensors.torch import load_file, save_file

from tests.checkpoints import Quant, State, tiny_config, write_checkpoint

CONFIG = tiny_config()
LAST = "model.layers.3"
QUANTS: tuple[Quant, ...] = get_args(Quant)


def load(target: Path, donor: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(target), draft_model_path=str(donor), **options)
    return load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=True)


def schemes(loaded: LoadedModel) -> tuple[str, str]:
    """Of the target's and of the draft's experts."""
    return (
        next(m.scheme for m in loaded.report.target if m.kind == "experts.w2"),
        next(m.scheme for m in loaded.report.draft if m.kind == "experts.w2"),
    )


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("target_quant", ["none", "channel"])
def test_the_layer_keeps_the_quantization_of_where_it_comes_from(
    target_quant: Quant, quant: Quant, tmp_path: Path
) -> None:
    target = write_checkpoint(tmp_path / "target", tiny_config(num_nextn_predict_layers=0), quant=target_quant)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant=quant)
    loaded = load(target, donor)
    kinds = {"none": "unquantized", "channel": "fp8_channel"}
    expected = {"block": "fp8_block", "ct_block": "fp8_block", "tensor": "fp8_tensor", "tensor_static": "fp8_tensor"}
    assert schemes(loaded) == (kinds[target_quant], expected.get(quant) or kinds[quant])
    assert loaded.report.draft_path == str(donor)
    assert f"from {donor}" in loaded.report.as_table()
    assert loaded.draft is not None
    stored = load_file(donor / "mtp.safetensors")[f"{LAST}.enorm.weight"]
    torch.testing.assert_close(loaded.draft.enorm.weight.data, stored.float())
    assert loaded.draft.embed_tokens is loaded.target.embed_tokens
    assert loaded.draft.head.weight.shape == loaded.target.lm_head.weight.shape
    assert (loaded.draft.head is loaded.target.lm_head) == (quant == "none"), "an FP8 layer's head is FP8"


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_layer_that_would_borrow_from_a_target_of_another_model_is_refused(part: str, tmp_path: Path) -> None:
    def of_another(state: State) -> None:
        state[part] = torch.randn(state[part].shape, generator=torch.Generator().manual_seed(3)).bfloat16()

    def trained_on(state: State) -> None:
        state[part] = state[part].float() + 0.2 * torch.randn(state[part].shape) * state[part].float().std()

    target = write_checkpoint(tmp_path / "target", CONFIG)
    assert load(target, write_checkpoint(tmp_path / "kin", CONFIG, mutate=trained_on)).draft is not None
    with pytest.raises(CheckpointError, match=f"--speculative-draft-model-path .*stranger: {part}: .*another model"):
        load(target, write_checkpoint(tmp_path / "stranger", CONFIG, mutate=of_another))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_layer_trained_on_a_tied_head_borrows_no_other(is_tied: bool, tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", tiny_config(tie_word_embeddings=not is_tied))
    config = tiny_config(tie_word_embeddings=is_tied)
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings: found {is_tied}, expected {not is_tied} as in"):
        load(target, write_checkpoint(tmp_path / "without", config))
    assert load(target, write_checkpoint(tmp_path / "with", config, own_head=True)).draft is not None


def test_its_own_head_and_embedding_come_along(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", tiny_config(num_nextn_predict_layers=0))
    donor = write_checkpoint(tmp_path / "donor", CONFIG, own_head=True, own_embedding=True, seed=2)
    loaded = load(target, donor)
    assert loaded.draft is not None
    assert loaded.draft.embed_tokens is not loaded.target.embed_tokens
    assert "the target's" not in loaded.report.as_table()


def test_the_donor_needs_no_more_than_its_layer(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", CONFIG)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant="channel", seed=2)
    (donor / "model.safetensors").unlink()
    (donor / "model.safetensors.index.json").unlink()
    assert schemes(load(target, donor)) == ("unquantized", "fp8_channel")


def test_of_a_donor_with_an_index_only_the_layers_files_need_be_there(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", CONFIG)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant="channel", seed=2)
    (donor / "model.safetensors").unlink()
    assert schemes(load(target, donor)) == ("unquantized", "fp8_channel")
    (donor / "mtp.safetensors").rename(donor / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json: names mtp\.safetensors, which is not in the folder"):
        load(target, donor)


def test_a_donors_list_may_name_the_modules_that_are_not_taken(tmp_path: Path) -> None:
    def donor(name: str, *entries: str) -> Path:
        def ignore(config: dict[str, Any]) -> None:
            config["quantization_config"]["ignore"] += entries

        folder = write_checkpoint(tmp_path / name, CONFIG, quant="channel", mutate_config=ignore)
        (folder / "model.safetensors").unlink()
        return folder

    target = write_checkpoint(tmp_path / "target", CONFIG)
    listed = donor("listed", *(f"model.layers.2.mlp.experts.{e}.down_proj" for e in range(8)))
    assert schemes(load(target, listed)) == ("unquantized", "fp8_channel")
    with pytest.raises(
        QuantizationError, match=r"ignore entry 'model\.layers\.2\.mlp\.experts\.8\.down_proj' names no"
    ):
        load(target, donor("beyond", "model.layers.2.mlp.experts.8.down_proj"))


@pytest.mark.parametrize("in_index", [True, False])
@pytest.mark.parametrize("is_own", [True, False])
def test_of_a_donor_on_the_hub_only_what_the_layer_takes_is_downloaded(
    is_own: bool, in_index: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding and the head too, where the layer would borrow the target's: they tell another model."""
    there = write_checkpoint(tmp_path / "there", CONFIG, in_index=in_index, own_head=is_own, own_embedding=is_own)
    index = there / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    stored = load_file(there / "model.safetensors")
    apart = {"model.embed_tokens.weight": "first.safetensors", "lm_head.weight": "last.safetensors"}
    for name, file in apart.items():
        save_file({name: stored.pop(name)}, there / file)
    save_file(stored, there / "model.safetensors")
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], **apart}}))
    (there / "pytorch_model.bin").touch()
    here = tmp_path / "here"

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        here.mkdir(exist_ok=True)
        names = [file.name for file in there.iterdir()]
        for wanted in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(there / wanted, here)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    target = write_checkpoint(tmp_path / "target", CONFIG)
    args = ServerArgs(model_path=str(target), speculative_draft_model_path="owner/name")
    assert resolved_config(args).draft_model_path == str(here)
    expected = {"mtp.safetensors"} if is_own and in_index else {"mtp.safetensors", *apart.values()}
    assert {file.name for file in here.iterdir()} == {"config.json", index.name, *expected}
    assert load(target, here).draft is not None


def test_the_layers_own_context_length_does_not_matter(tmp_path: Path) -> None:
    """4.5's layer (131072 positions) must reach as far as 4.6 (202752): rotary tables are computed, not trained."""
    target = write_checkpoint(tmp_path / "target", tiny_config(max_position_embeddings=1024))
    donor = write_checkpoint(tmp_path / "donor", tiny_config(max_position_embeddings=64))
    loaded = load(target, donor)
    assert loaded.draft is not None
    assert loaded.draft.config.max_position_embeddings == 1024


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden size": ({"hidden_size": 64}, "hidden_size: found 64, expected 48"),
    "vocabulary": ({"vocab_size": 65}, "vocab_size: found 65, expected 64"),
    "layer index": ({"num_hidden_layers": 4}, "num_hidden_layers: found 4, expected 3"),
    "heads": ({"num_attention_heads": 8}, "num_attention_heads: found 8, expected 4"),
    "KV heads": ({"num_key_value_heads": 1}, "num_key_value_heads: found 1, expected 2"),
    "head size": ({"head_dim": 32}, "head_dim: found 32, expected 16"),
    "rotation": ({"rope_theta": 5000.0}, r"rope_theta: found 5000\.0, expected 10000\.0"),
    "rotated share": ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor: found 0\.25, expected 0\.5"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_layer_that_does_not_fit_is_refused_with_both_values(name: str, tmp_path: Path) -> None:
    changes, message = MISFITS[name]
    target = write_checkpoint(tmp_path / "target", CONFIG)
    donor = write_checkpoint(tmp_path / "donor", tiny_config(**changes))
    with pytest.raises(CheckpointError, match=f"--speculative-draft-model-path .*donor: {message}"):
        load(target, donor)


def test_a_donor_without_the_layer_is_refused(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", CONFIG)
    donor = write_checkpoint(tmp_path / "donor", tiny_config(num_nextn_predict_layers=0))
    with pytest.raises(CheckpointError, match=r"donor: config\.json names no NextN layer"):
        load(target, donor)
    with pytest.raises(CheckpointError, match=r"--speculative-draft-model-path .*nowhere: there is no such folder"):
        load(target, tmp_path / "nowhere")


def test_the_donors_layer_is_checked_like_the_targets(tmp_path: Path) -> None:
    def no_scale(state: State) -> None:
        del state[f"{LAST}.self_attn.o_proj.weight_scale"]

    target = write_checkpoint(tmp_path / "target", CONFIG)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant="channel", mutate=no_scale)
    with pytest.raises(QuantizationError, match=f"{LAST}.self_attn.o_proj: float8_e4m3fn weight, but it has no"):
        load(target, donor)


def test_the_override_is_judged_against_the_donor(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", CONFIG)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant="block")
    assert schemes(load(target, donor, draft_quantization="fp8")) == ("unquantized", "fp8_block")
    with pytest.raises(QuantizationError, match="the draft's tensors are fp8, which is not compatible"):
        load(target, donor, draft_quantization="compressed-tensors")


def _undeclared(config: dict[str, Any]) -> None:
    del config["quantization_config"]


@pytest.mark.parametrize(
    ("quant", "override", "scheme"),
    [
        ("channel", "compressed-tensors", "fp8_channel"),
        ("tensor", "compressed-tensors", "fp8_tensor"),
        ("tensor_static", "fp8", "fp8_tensor"),
        ("channel", "unquant", "fp8_channel"),
    ],
)
def test_the_override_names_the_method_of_a_donor_that_declares_none(
    quant: Quant, override: str, scheme: str, tmp_path: Path
) -> None:
    target = write_checkpoint(tmp_path / "target", CONFIG)
    declared = write_checkpoint(tmp_path / "declared", CONFIG, quant=quant)
    donor = write_checkpoint(tmp_path / "donor", CONFIG, quant=quant, mutate_config=_undeclared)
    loaded, expected = load(target, donor, draft_quantization=override), load(target, declared)
    assert schemes(loaded) == ("unquantized", scheme)
    assert loaded.draft is not None
    assert expected.draft is not None
    o_projs = [one.block.self_attn.o_proj.weight for one in (loaded.draft, expected.draft)]
    torch.testing.assert_close(*o_projs, rtol=1e-6, atol=0)
    with pytest.raises(
        QuantizationError, match=r"q_proj\.weight: holds float8_e4m3fn codes, but it is declared unq"
    ) as told:
        load(target, donor)
    assert str(told.value).endswith(", or pass --speculative-draft-model-quantization compressed-tensors")


def test_blocks_that_nothing_declares_are_of_128(tmp_path: Path) -> None:
    def in_large_blocks(state: State) -> None:
        for name in [name for name in state if name.endswith("_scale")]:
            state[f"{name}_inv"] = state.pop(name).view(1, 1)

    def donor(name: str, mutate: Callable[[State], None] | None, quant: Quant) -> Path:
        return write_checkpoint(tmp_path / name, CONFIG, quant=quant, mutate=mutate, mutate_config=_undeclared)

    target = write_checkpoint(tmp_path / "target", CONFIG)
    assert schemes(load(target, donor("large", in_large_blocks, "tensor"), draft_quantization="fp8"))[1] == "fp8_block"
    with pytest.raises(CheckpointError, match=r"weight_scale_inv: found shape .*, expected \(1, 1\), as fp8_block"):
        load(target, donor("small", None, "block"), draft_quantization="fp8")


def test_an_override_that_is_not_what_a_donor_holds_says_what_it_holds(tmp_path: Path) -> None:
    def no_scales(state: State) -> None:
        for name in [name for name in state if name.endswith("_scale")]:
            del state[name]

    def two_kinds(state: State) -> None:
        name = f"{LAST}.self_attn.o_proj.weight_scale"
        state[name] = state[name].mean().view(1)

    target = write_checkpoint(tmp_path / "target", CONFIG)
    cases: list[tuple[Callable[[State], None] | None, str]] = [
        (
            None,
            "the draft's tensors are compressed-tensors, which is not .*; pass compressed-tensors, which config.json",
        ),
        (no_scales, "--speculative-draft-model-quantization fp8: the draft has float8_e4m3fn weights without a scale"),
        (two_kinds, "is fp8_channel with a weight_scale, but .*o_proj is fp8_tensor with a weight_scale; declare"),
    ]
    for i, (mutate, message) in enumerate(cases):
        donor = write_checkpoint(
            tmp_path / f"donor{i}", CONFIG, quant="channel", mutate=mutate, mutate_config=_undeclared
        )
        with pytest.raises(QuantizationError, match=message):
            load(target, donor, draft_quantization="fp8")


def test_the_flag_reaches_the_engine_and_drafts_as_well(tmp_path: Path) -> None:
    """The embedded model's own layer, taken out of a copy, drafts exactly as in place."""
    donor = shutil.copytree(demo.checkpoint_dir(), tmp_path / "donor")
    args = ServerArgs.from_cli(["--speculative-draft-model-path", str(donor)], {})
    assert args.engine_config("x").draft_model_path == str(donor)
    prompt, params = "The capital of France is", SamplingParams(max_new_tokens=24, temperature=0.0)
    options: dict[str, Any] = {"speculative_num_steps": 3, "max_running_requests": 1, "context_length": 256}
    own = LLM(**options).generate(prompt, params)[0]
    other = LLM(speculative_draft_model_path=str(donor), **options).generate(prompt, params)[0]
    assert other.output_ids == own.output_ids
    assert other.meta_info["num_accepted"] == own.meta_info["num_accepted"]
    assert sum([other.meta_info["num_accepted"]]) > 0
