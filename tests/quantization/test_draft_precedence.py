"""The draft keeps what the loader detected, unless it is overridden: every row of the table, on files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.config.server_args import ServerArgs
from nextn.errors import CheckpointError, QuantizationError

from tests.checkpoints import Draft, Quant, State, dequantized, quantized, random_state, tiny_config, write_checkpoint

FP8: tuple[Quant, ...] = tuple(q for q in get_args(Quant) if q != "none")
CONFIG = tiny_config()
LAST = "model.layers.3"
KIND = {
    "channel": "fp8_channel",
    "tensor": "fp8_tensor",
    "tensor_static": "fp8_tensor",
    "block": "fp8_block",
    "ct_block": "fp8_block",
    "none": "unquantized",
}
METHOD = {"block": "fp8"}
BF16_DRAFTS: tuple[Draft, ...] = ("bf16_ignored", "bf16_regex", "bf16_no_scales")


def load(folder: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(folder), **options)
    return load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=True)


def loaded_weights(loaded: LoadedModel) -> State:
    """The draft's o_proj and its first expert's matrices, as they compute."""
    assert loaded.draft is not None
    block = loaded.draft.block
    inner = CONFIG["moe_intermediate_size"]
    return {
        f"{LAST}.self_attn.o_proj.weight": block.self_attn.o_proj.weight,
        f"{LAST}.mlp.experts.0.gate_proj.weight": block.mlp.experts.w13[0, :inner],
        f"{LAST}.mlp.experts.0.up_proj.weight": block.mlp.experts.w13[0, inner:],
        f"{LAST}.mlp.experts.7.down_proj.weight": block.mlp.experts.w2[7],
        f"{LAST}.mlp.shared_experts.down_proj.weight": block.mlp.shared_experts.down_proj.weight,
        f"{LAST}.eh_proj.weight": loaded.draft.eh_proj.weight,
    }


def assert_weights(loaded: LoadedModel, quant: Quant, *, bf16_draft: bool = False) -> None:
    stored = quantized(random_state(CONFIG), quant, torch.bfloat16, lambda n: bf16_draft and n.startswith(LAST))
    expected = dequantized(stored)
    for name, weight in loaded_weights(loaded).items():
        torch.testing.assert_close(weight.data, expected[name], rtol=1e-6, atol=0)
        if stored[name].dtype == torch.float8_e4m3fn:
            assert not torch.allclose(weight.data, stored[name].float()), "a raw cast of the codes would pass"


def draft_schemes(loaded: LoadedModel) -> set[str]:
    assert loaded.draft is not None
    kinds = (
        "qkv_proj",
        "o_proj",
        "experts.w13",
        "experts.w2",
        "shared_experts.gate_up_proj",
        "shared_experts.down_proj",
    )
    found = {m.kind: m.scheme for m in loaded.report.draft if m.kind in kinds}
    assert set(found) == set(kinds)
    return set(found.values())


@pytest.mark.parametrize("quant", ["none", *FP8])
def test_unset_keeps_what_is_detected(quant: Quant, tmp_path: Path) -> None:
    loaded = load(write_checkpoint(tmp_path, CONFIG, quant=quant))
    assert draft_schemes(loaded) == {KIND[quant]}
    assert_weights(loaded, quant)
    assert loaded.draft is not None
    scheme = loaded.draft.quant_config.scheme_for([f"{LAST}.self_attn.o_proj"])  # type: ignore[union-attr]
    assert scheme.kind == KIND[quant]


@pytest.mark.parametrize("quant", FP8)
@pytest.mark.parametrize("draft", BF16_DRAFTS)
@pytest.mark.parametrize("override", [None, "unquant"])
def test_a_bf16_draft_of_an_fp8_target_is_bf16(
    quant: Quant, draft: Draft, override: str | None, tmp_path: Path
) -> None:
    loaded = load(write_checkpoint(tmp_path, CONFIG, quant=quant, draft=draft), draft_quantization=override)
    assert {m.scheme for m in loaded.report.target if m.kind == "qkv_proj"} == {KIND[quant]}
    assert draft_schemes(loaded) == {"unquantized"}
    assert_weights(loaded, quant, bf16_draft=True)
    assert "unquantized" in (loaded.report.draft_reason or "")


@pytest.mark.parametrize("entries", [["self_attn.q_proj"], ["mlp.experts.3.up_proj", "mlp.shared_experts.gate_proj"]])
def test_a_bf16_draft_of_which_some_shards_are_ignored_is_bf16(entries: list[str], tmp_path: Path) -> None:
    def ignore(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] += [f"{LAST}.{entry}" for entry in entries]

    loaded = load(write_checkpoint(tmp_path, CONFIG, quant="channel", draft="bf16_no_scales", mutate_config=ignore))
    assert draft_schemes(loaded) == {"unquantized"}
    assert_weights(loaded, "channel", bf16_draft=True)


def _drop_scale(state: State) -> None:
    for suffix in ("weight_scale", "weight_scale_inv"):
        state.pop(f"{LAST}.mlp.experts.3.up_proj.{suffix}", None)


@pytest.mark.parametrize("override", [None, "unquant"])
@pytest.mark.parametrize("quant", FP8)
def test_fp8_codes_without_a_scale_are_refused_by_name(quant: Quant, override: str | None, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant, mutate=_drop_scale)
    with pytest.raises(QuantizationError, match=rf"{LAST}\.mlp\.experts\.3\.up_proj.*has no weight_scale"):
        load(folder, draft_quantization=override)


def test_all_scales_dropped_is_refused_and_never_a_raw_cast(tmp_path: Path) -> None:
    def drop_all(state: State) -> None:
        for name in [n for n in state if n.startswith(LAST) and n.endswith("_scale")]:
            del state[name]

    with pytest.raises(QuantizationError, match=f"{LAST}.self_attn.q_proj: float8_e4m3fn weight"):
        load(write_checkpoint(tmp_path, CONFIG, quant="channel", mutate=drop_all))


def test_a_scale_that_nothing_would_apply_is_refused(tmp_path: Path) -> None:
    def unquantize(state: State) -> None:
        name = f"{LAST}.self_attn.o_proj.weight"
        state[name] = state[name].to(torch.bfloat16)

    with pytest.raises(QuantizationError, match=f"{LAST}.self_attn.o_proj: BF16 weight with a weight_scale"):
        load(write_checkpoint(tmp_path, CONFIG, quant="channel", mutate=unquantize))


def test_an_ignore_entry_that_names_an_fp8_module_is_refused(tmp_path: Path) -> None:
    def ignore(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"].append(f"{LAST}.self_attn.o_proj")

    with pytest.raises(QuantizationError, match=f"{LAST}.self_attn.o_proj.weight: holds float8_e4m3fn codes"):
        load(write_checkpoint(tmp_path, CONFIG, quant="channel", mutate_config=ignore))


@pytest.mark.parametrize("quant", FP8)
def test_a_compatible_method_is_that_method(quant: Quant, tmp_path: Path) -> None:
    method = METHOD.get(quant, "compressed-tensors")
    loaded = load(write_checkpoint(tmp_path, CONFIG, quant=quant), draft_quantization=method)
    assert draft_schemes(loaded) == {KIND[quant]}
    assert_weights(loaded, quant)


@pytest.mark.parametrize(
    ("quant", "draft", "override", "found"),
    [
        *((q, "same", {"block": "compressed-tensors"}.get(q, "fp8"), METHOD.get(q, "compressed-tensors")) for q in FP8),
        *((q, d, METHOD.get(q, "compressed-tensors"), "unquantized") for q in FP8 for d in BF16_DRAFTS),
        ("none", "same", "fp8", "unquantized"),
        ("none", "same", "compressed-tensors", "unquantized"),
    ],
)
def test_an_incompatible_method_is_refused_naming_both(
    quant: Quant, draft: Draft, override: str, found: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant, draft=draft)
    with pytest.raises(QuantizationError, match=f"{override}: the draft's tensors are {found}"):
        load(folder, draft_quantization=override)


@pytest.mark.parametrize("quant", FP8)
def test_unquant_dequantizes_with_a_warning(quant: Quant, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load(write_checkpoint(tmp_path, CONFIG, quant=quant), draft_quantization="unquant")
    assert_weights(loaded, quant)
    assert "multiplied by their scales" in caplog.text
    assert "unquant" in (loaded.report.draft_reason or "")
    assert loaded.draft is not None
    scheme = loaded.draft.quant_config.scheme_for([f"{LAST}.self_attn.o_proj"])  # type: ignore[union-attr]
    assert scheme.kind == "unquantized", "nothing may stay FP8"
    sources = {m.source for m in loaded.report.draft if m.scheme == KIND[quant]}
    assert sources == {"--speculative-draft-model-quantization unquant: weight x scale on load"}


@pytest.mark.parametrize("quant", FP8)
def test_unquant_still_refuses_a_scale_that_cannot_scale(quant: Quant, tmp_path: Path) -> None:
    def spoil(state: State) -> None:
        name = next(name for name in state if name.startswith(f"{LAST}.self_attn.o_proj.weight_scale"))
        state[name] = state[name] * 0

    with pytest.raises(CheckpointError, match=f"{LAST}.self_attn.o_proj.weight_scale.* holds a scale"):
        load(write_checkpoint(tmp_path, CONFIG, quant=quant, mutate=spoil), draft_quantization="unquant")


FLAG = "--speculative-draft-model-quantization"


@pytest.mark.parametrize("quant", ["none", *FP8])
@pytest.mark.parametrize("state", ["absent", "unset", "unquant", "method"])
def test_the_override_has_three_states_from_the_flag_to_the_constructor(
    quant: Quant, state: str, tmp_path: Path
) -> None:
    method = METHOD.get(quant, "compressed-tensors")
    value = {"unset": "unset", "unquant": "unquant", "method": method}.get(state)
    config = ServerArgs.from_cli([FLAG, value] if value else [], {}).engine_config(
        str(write_checkpoint(tmp_path, CONFIG, quant=quant))
    )
    assert config.draft_quantization == {"unquant": "unquant", "method": method}.get(state)
    if quant == "none" and state == "method":
        with pytest.raises(QuantizationError, match=f"{FLAG} compressed-tensors: the draft's tensors are unquantized"):
            load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=None)
        return
    loaded = load_model(config, device=torch.device("cpu"), dtype=torch.float32, want_draft=None)
    assert loaded.draft is not None
    given = loaded.draft.quant_config.scheme_for([f"{LAST}.self_attn.o_proj"])  # type: ignore[union-attr]
    assert given.kind == ("unquantized" if state == "unquant" else KIND[quant])
    assert (FLAG in given.source) == (state in ("unquant", "method") and quant != "none")
    assert_weights(loaded, quant)


@pytest.mark.parametrize("quant", FP8)
def test_unquant_drafts_the_same_numbers_as_the_kept_config(quant: Quant, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant)
    kept, expanded = loaded_weights(load(folder)), loaded_weights(load(folder, draft_quantization="unquant"))
    for name in kept:
        assert torch.equal(kept[name], expanded[name])


def test_unquant_on_bf16_is_bf16(tmp_path: Path) -> None:
    loaded = load(write_checkpoint(tmp_path, CONFIG), draft_quantization="unquant")
    assert draft_schemes(loaded) == {"unquantized"}
    assert_weights(loaded, "none")
