"""Checkpoints that must be refused, as files: what is wrong with each, and what the refusal must say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import Quant, State, tiny_config, write_checkpoint

CONFIG = tiny_config()
O_PROJ = "model.layers.1.self_attn.o_proj"
LAST = "model.layers.3"


@dataclass(frozen=True)
class Broken:
    """write: makes the folder; message: pattern of the refusal; is_deep: only reading values shows it."""

    write: Callable[[Path], Path]
    message: str
    is_deep: bool = False


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        state[name] = change(state[name])

    return mutate


def _add(name: str, tensor: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: tensor})


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


def _shift_norms(*parts: str) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        for name in state:
            if name.endswith("norm.weight") and any(part in name for part in parts):
                state[name] = state[name] - 1

    return mutate


def _tensors(
    quant: Quant, mutate: Callable[[State], None], message: str, *, is_deep: bool = False, **config: Any
) -> Broken:
    changed = tiny_config(**config)
    return Broken(lambda folder: write_checkpoint(folder, changed, quant=quant, mutate=mutate), message, is_deep)


def _config(quant: Quant, mutate: Callable[[dict[str, Any]], None], message: str) -> Broken:
    return Broken(lambda folder: write_checkpoint(folder, CONFIG, quant=quant, mutate_config=mutate), message)


def _ignore(entry: str, quant: Quant = "channel", message: str | None = None) -> Broken:
    field = "modules_to_not_convert" if quant == "block" else "ignore"

    def mutate(config: dict[str, Any]) -> None:
        config["quantization_config"][field].append(entry)

    return _config(quant, mutate, message or rf"{field} entry .* names no module of this checkpoint")


def _raw_draft(state: State) -> None:
    """The NextN layer's codes in bfloat16, as another tool may have copied them."""
    for name in [name for name in state if name.startswith(LAST)]:
        if name.endswith("_scale"):
            del state[name]
        elif state[name].dtype == torch.float8_e4m3fn:
            state[name] = state[name].to(torch.bfloat16)


def _draft_scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def mutate(state: State) -> None:
        for name in state:
            if name.startswith(LAST) and "_scale" in name:
                state[name] = change(state[name])

    return mutate


def _set_fields(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(fields)


def _files(spoil: Callable[[Path], None], message: str, quant: Quant = "none") -> Broken:
    def write(folder: Path) -> Path:
        write_checkpoint(folder, CONFIG, quant=quant)
        spoil(folder)
        return folder

    return Broken(write, message)


def _bytes(change: Callable[[bytes], bytes]) -> Broken:
    def spoil(folder: Path) -> None:
        file = folder / "mtp.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return _files(spoil, r"mtp\.safetensors: (is not a safetensors file|has \d+ bytes)")


def _number_in_metadata(whole: bytes) -> bytes:
    """The library that reads the tensors takes no such file."""
    length = int.from_bytes(whole[:8], "little")
    text = '{"__metadata__": {"total_size": 1}, ' + whole[9 : 8 + length].decode()
    return len(text).to_bytes(8, "little") + text.encode() + whole[8 + length :]


def _in_utf_16(whole: bytes) -> bytes:
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].decode().encode("utf-16")
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


def _repeat_a_name(whole: bytes) -> bytes:
    """A header in which one name stands twice; a plain JSON reader keeps the last."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = f"{LAST}.enorm.weight"
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}' + "}"
    return len(text).to_bytes(8, "little") + text.encode() + whole[8 + length :]


def _twice(folder: Path) -> None:
    file = folder / "mtp.safetensors"
    file.write_bytes(_repeat_a_name(file.read_bytes()))


def _edit_index(edit: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return spoil


def _only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def _all_draft_scales(state: State) -> None:
    for name in [name for name in state if name.startswith(LAST) and name.endswith("_scale")]:
        del state[name]


def _expert_in_bf16(state: State) -> None:
    name = f"{LAST}.mlp.experts.3.up_proj"
    state[f"{name}.weight"] = state[f"{name}.weight"].float().to(torch.bfloat16)
    del state[f"{name}.weight_scale"]


def _k_proj_in_bf16(state: State) -> None:
    name = "model.layers.1.self_attn.k_proj"
    state[f"{name}.weight"] = state[f"{name}.weight"].float().to(torch.bfloat16)
    del state[f"{name}.weight_scale"]


BROKEN: dict[str, Broken] = {
    # parameters
    "missing": _tensors("none", _drop(f"{O_PROJ}.weight"), f"{O_PROJ}.weight is missing; download"),
    "several missing": _tensors(
        "none", _drop(".mlp.experts.5."), r"experts\.5\..*\(9 tensors\)|\(6 tensors\) are missing"
    ),
    "draft tensor missing": _tensors("channel", _drop(f"{LAST}.hnorm.weight"), rf"{LAST}\.hnorm\.weight is missing"),
    "layer missing": _tensors(
        "none", _drop("model.layers.1."), r"no file has a tensor model\.layers\.1\.\*, expected 3"
    ),
    "experts missing": _tensors("none", _drop(".mlp.experts.7."), r"model\.layers\.1\.mlp\.experts\.7\.\*, expected 8"),
    "unread": _tensors("none", _add(f"{O_PROJ}.bias", torch.zeros(3)), f"{O_PROJ}.bias is in the checkpoint"),
    "layer too many": _tensors(
        "none", _add("model.layers.4.enorm.weight", torch.ones(48)), r"model\.layers\.4\.enorm\.weight is in the check"
    ),
    "wrong shape": _tensors(
        "none", _set(f"{O_PROJ}.weight", lambda t: t[:-1]), rf"{O_PROJ}\.weight: found shape \(47, 64\)"
    ),
    "eh_proj of the wrong width": _tensors(
        "none",
        _set(f"{LAST}.eh_proj.weight", lambda t: t[:, :48]),
        rf"{LAST}\.eh_proj\.weight: found shape \(48, 48\), expected \(48, 96\): .*side by side",
    ),
    "integers": _tensors(
        "none", _set("model.norm.weight", lambda t: t.to(torch.int64)), r"model\.norm\.weight: found I64"
    ),
    "tied head differs": _tensors(
        "none",
        _add("lm_head.weight", torch.ones(64, 48, dtype=torch.bfloat16)),
        r"lm_head\.weight: differs from model\.embed_tokens\.weight",
        is_deep=True,
        tie_word_embeddings=True,
    ),
    # scales and codes
    "unread scale": _tensors(
        "channel",
        _add(f"{O_PROJ}.k_scale", torch.ones(1)),
        f"{O_PROJ}.k_scale is in the .* nothing .* apply such a scale",
    ),
    "both kinds of scale": _tensors(
        "channel",
        _add(f"{O_PROJ}.weight_scale_inv", torch.ones(48, 1)),
        f"{O_PROJ}.weight_scale_inv is in the checkpoint",
    ),
    "input scale without use": _tensors(
        "channel", _add(f"{O_PROJ}.input_scale", torch.ones(1)), f"{O_PROJ}.input_scale is in the checkpoint"
    ),
    "scale of BF16": _tensors(
        "channel",
        _set(f"{LAST}.self_attn.o_proj.weight", lambda t: t.float().to(torch.bfloat16)),
        f"{LAST}.self_attn.o_proj: BF16 weight with a weight_scale that nothing would apply",
    ),
    "no scale": _tensors(
        "channel", _drop(f"{O_PROJ}.weight_scale"), f"{O_PROJ}: float8_e4m3fn weight, but it has no weight_scale"
    ),
    "no scale in the draft": _tensors("channel", _all_draft_scales, f"{LAST}.* float8_e4m3fn weight, but it has no"),
    "scale of another name": _tensors(
        "block",
        lambda s: s.update({f"{O_PROJ}.weight_scale": s.pop(f"{O_PROJ}.weight_scale_inv")}),
        f"{O_PROJ}: float8_e4m3fn weight, but its scale is named weight_scale",
    ),
    "wrong scale shape": _tensors(
        "channel",
        _set(f"{O_PROJ}.weight_scale", lambda t: t[:-1]),
        rf"{O_PROJ}\.weight_scale: found shape \(47, 1\), expected \(48, 1\)",
    ),
    "wrong block shape": _tensors(
        "block",
        _set(f"{O_PROJ}.weight_scale_inv", lambda t: t[:, :-1]),
        r"weight_scale_inv: found shape \(3, 3\), expected \(3, 4\)",
    ),
    "one scale for channels": _tensors(
        "tensor",
        _set(f"{O_PROJ}.weight_scale", lambda t: t.expand(48)),
        r"found shape \(48,\), expected of one element",
    ),
    "scale of powers of two": _tensors(
        "channel",
        _set(f"{O_PROJ}.weight_scale", lambda t: t.to(torch.float8_e8m0fnu)),
        rf"{O_PROJ}\.weight_scale: found F8_E8M0, expected one of BF16, F16, F32, F64; store it as such",
    ),
    "integer scale": _tensors(
        "channel", _set(f"{O_PROJ}.weight_scale", lambda t: t.to(torch.int32)), f"{O_PROJ}.weight_scale: found I32"
    ),
    "scale of zero": _tensors(
        "channel",
        _set(f"{O_PROJ}.weight_scale", _with(0.0)),
        f"{O_PROJ}.weight_scale: holds a scale .*found 0",
        is_deep=True,
    ),
    "negative scale": _tensors(
        "channel", _set(f"{O_PROJ}.weight_scale", _with(-1.0)), "weight_scale: holds a scale .*found -1", is_deep=True
    ),
    "NaN scale": _tensors(
        "block",
        _set(f"{O_PROJ}.weight_scale_inv", _with(float("nan"))),
        "weight_scale_inv: holds a scale .*nan",
        is_deep=True,
    ),
    "infinite scale": _tensors(
        "tensor", _set(f"{O_PROJ}.weight_scale", _with(float("inf"))), "weight_scale: holds a scale .*inf", is_deep=True
    ),
    "zero scale in the draft": _tensors(
        "channel",
        _set(f"{LAST}.mlp.experts.2.down_proj.weight_scale", lambda t: (t * 0).to(torch.bfloat16)),
        rf"{LAST}\.mlp\.experts\.2\.down_proj\.weight_scale: holds a scale",
        is_deep=True,
    ),
    "negative input scale": _tensors(
        "tensor_static", _set(f"{O_PROJ}.input_scale", _with(-0.5)), "input_scale: holds a scale", is_deep=True
    ),
    "codes in a norm": _tensors(
        "none", _set("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)), r"model\.norm\.weight: found F8_E4M3"
    ),
    "codes in the head": _tensors(
        "none",
        _set("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        r"lm_head\.weight: found F8_E4M3, .*codes without",
    ),
    "codes without config": _tensors(
        "none",
        _set(f"{O_PROJ}.weight", lambda t: t.to(torch.float8_e4m3fn)),
        rf"{O_PROJ}\.weight: holds float8_e4m3fn codes",
    ),
    "the other FP8": _tensors(
        "channel",
        _set(f"{O_PROJ}.weight", lambda t: t.float().to(torch.float8_e5m2)),
        rf"{O_PROJ}\.weight: found F8_E5M2",
    ),
    "the other FP8 in a norm": _tensors(
        "none", _set("model.norm.weight", lambda t: t.to(torch.float8_e5m2)), r"model\.norm\.weight: found F8_E5M2"
    ),
    # fused modules
    "q and k disagree": _tensors(
        "channel",
        _k_proj_in_bf16,
        r"q_proj is fp8_channel .* but model\.layers\.1\.self_attn\.k_proj is unquantized .* quantize both",
    ),
    "experts disagree": _tensors(
        "channel", _expert_in_bf16, r"experts\.0\.gate_proj is fp8_channel .* but .*experts\.3\.up_proj is unquantized"
    ),
    "gate and up disagree by name": _ignore(
        "model.layers.0.mlp.up_proj", message=r"layers\.0\.mlp\.up_proj\.weight: holds float8_e4m3fn .* \(ignore entry"
    ),
    # norms
    "all norms shifted": _tensors(
        "none", _shift_norms(""), r"norm\.weight: mean .* stored shifted by one .* add 1", is_deep=True
    ),
    "target norms shifted": _tensors(
        "channel",
        _shift_norms(*(f"layers.{i}." for i in range(3))),
        r"model\.layers\.0\..*stored shifted by one",
        is_deep=True,
    ),
    "draft block norms shifted": _tensors(
        "none",
        _shift_norms(f"{LAST}.input", f"{LAST}.post", f"{LAST}.self"),
        rf"{LAST}\..*stored shifted by one",
        is_deep=True,
    ),
    "draft's own norms shifted": _tensors(
        "none", _shift_norms("enorm", "hnorm", "shared_head"), rf"{LAST}\.enorm\.weight: mean .* 3 of 3", is_deep=True
    ),
    "norms at zero": _tensors(
        "none",
        lambda s: s.update({n: t * 0 for n, t in s.items() if "norm" in n}),
        "nothing but zeros: .* never written",
        is_deep=True,
    ),
    # values
    "a norm at zero": _tensors(
        "channel",
        _set(f"{LAST}.hnorm.weight", torch.zeros_like),
        r"hnorm\.weight: holds nothing but zeros",
        is_deep=True,
    ),
    "codes at zero": _tensors(
        "channel",
        _set(f"{LAST}.mlp.experts.1.down_proj.weight", torch.zeros_like),
        r"experts\.1\.down_proj\.weight: holds nothing but zeros, as a part of a file that was never written",
        is_deep=True,
    ),
    "an expert of the target at zero": _tensors(
        "block",
        _set("model.layers.2.mlp.experts.5.up_proj.weight", torch.zeros_like),
        r"model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight: holds nothing but zeros",
        is_deep=True,
    ),
    "a projection at zero": _tensors(
        "none", _set(f"{LAST}.eh_proj.weight", torch.zeros_like), r"eh_proj\.weight: holds nothing", is_deep=True
    ),
    "a router at zero": _tensors(
        "none", _set(f"{LAST}.mlp.gate.weight", torch.zeros_like), r"gate\.weight: holds nothing", is_deep=True
    ),
    "a head at zero": _tensors(
        "none", _set("lm_head.weight", torch.zeros_like), r"lm_head\.weight: holds nothing but zeros", is_deep=True
    ),
    "NaN in an embedding": _tensors(
        "none", _set("model.embed_tokens.weight", _with(float("nan"))), r"tokens\.weight: holds nan", is_deep=True
    ),
    "NaN in codes": _tensors(
        "channel",
        _set(f"{LAST}.self_attn.o_proj.weight", _with(float("nan"))),
        r"o_proj\.weight: holds nan",
        is_deep=True,
    ),
    # ignore lists
    "ignore a runtime name": _ignore("model.decoder.eh_proj"),
    "ignore without model": _ignore(f"layers.{3}.eh_proj", message=rf"did you mean '{LAST}\.eh_proj'"),
    "ignore off by one": _ignore("model.layers.4.eh_proj"),
    "ignore an expert too many": _ignore(f"{LAST}.mlp.experts.8.up_proj"),
    "ignore a pattern": _ignore(r"re:model\.mtp\..*"),
    "ignore a broken pattern": _ignore("re:(", message="no regular expression"),
    "ignore half a name": _ignore("model.layers.1.self_attn.o", "block"),
    "ignore a prefix too many": _ignore("language_model.lm_head", "block", message="did you mean 'lm_head'"),
    "ignore an fp8 module": _ignore(
        f"{LAST}.self_attn.o_proj", message=rf"{LAST}\.self_attn\.o_proj\.weight: holds float8"
    ),
    # the NextN layer
    "NextN absent": Broken(
        lambda folder: write_checkpoint(folder, CONFIG, draft="absent"),
        r"names a NextN layer, but no file has a tensor model\.layers\.3\.\*.*--speculative-algorithm none",
    ),
    "NaN in a norm": _tensors(
        "none",
        _set("model.layers.1.input_layernorm.weight", _with(float("nan"))),
        "1.input_layernorm.weight: holds nan",
        is_deep=True,
    ),
    "NaN in one of the draft's norms": _tensors(
        "none", _set(f"{LAST}.enorm.weight", _with(float("nan"))), rf"{LAST}\.enorm\.weight: holds nan", is_deep=True
    ),
    "infinite router bias": _tensors(
        "none",
        _set(f"{LAST}.mlp.gate.e_score_correction_bias", _with(float("inf"))),
        "correction_bias: holds inf",
        is_deep=True,
    ),
    "infinite bias": _tensors(
        "none",
        _set("model.layers.1.self_attn.k_proj.bias", _with(float("-inf"))),
        "k_proj.bias: holds -inf",
        is_deep=True,
    ),
    "draft of raw codes": _tensors("channel", _raw_draft, rf"{LAST}\..*FP8 codes without their scale", is_deep=True),
    "one of the draft's experts of raw codes": _tensors(
        "none",
        _set(f"{LAST}.mlp.experts.3.up_proj.weight", lambda w: w * 448),
        rf"{LAST}\.mlp\.experts\.3\.up_proj\.weight: half",
        is_deep=True,
    ),
    "draft scales of 1": _tensors(
        "block", _draft_scales(torch.ones_like), rf"{LAST}\..*, times weight_scale_inv, is", is_deep=True
    ),
    "reciprocal draft scales": _tensors(
        "channel", _draft_scales(lambda scale: 1 / scale), rf"{LAST}\..*, times weight_scale, is", is_deep=True
    ),
    "raw codes in a layer": _tensors(
        "none", _set(f"{O_PROJ}.weight", lambda w: w * 448), "o_proj.weight: half", is_deep=True
    ),
    # files
    "truncated": _bytes(lambda whole: whole[:-10]),
    "cut in the header": _bytes(lambda whole: whole[:100]),
    "four bytes": _bytes(lambda whole: whole[:4]),
    "empty": _bytes(lambda whole: b""),
    "noise": _bytes(lambda whole: b"x" * 500),
    "too long": _bytes(lambda whole: whole + b"more"),
    "no JSON": _bytes(lambda whole: whole[:8] + b"!" + whole[9:]),
    "shape and bytes disagree": _bytes(lambda whole: whole.replace(b'"shape":[48]', b'"shape":[49]', 1)),
    "metadata that is no text": _bytes(_number_in_metadata),
    "half a surrogate pair in a name": _bytes(lambda whole: whole.replace(b'"model.lay', b'"\\ud800l.lay', 1)),
    "a header in UTF-16": _bytes(_in_utf_16),
    "huge header": _bytes(lambda whole: b"\xff" * 8 + whole[8:]),
    "one name twice in a file": _files(_twice, rf"{LAST}\.enorm\.weight: is twice in .*mtp\.safetensors"),
    "one name in two files": _files(
        lambda folder: save_file({"model.norm.weight": torch.ones(48)}, folder / "extra.safetensors"),
        r"model\.norm\.weight: is in both extra\.safetensors and model\.safetensors",
    ),
    "index names a missing file": _files(
        _edit_index(lambda m: m.update({"a": "model-00002.safetensors"})), "names model-00002.safetensors"
    ),
    "file removed": _files(
        lambda folder: (folder / "mtp.safetensors").unlink(), r"index\.json: names mtp\.safetensors"
    ),
    "index names a missing tensor": _files(
        _edit_index(lambda m: m.update({"a.weight": "model.safetensors"})), r"a\.weight: listed in"
    ),
    "index names another file": _files(
        _edit_index(lambda m: m.update({"model.norm.weight": "mtp.safetensors"})),
        r"says mtp\.safetensors, but it is in",
    ),
    "index names a path": _files(
        _edit_index(lambda m: m.update({"a": "../model.safetensors"})), "expected tensor names mapped to names of files"
    ),
    "index is no JSON": _files(
        lambda folder: (folder / "model.safetensors.index.json").write_text("{") and None,
        r"index\.json: cannot be read",
    ),
    "only pickles": _files(_only_pickles, r"pickle format \(pytorch_model\.bin\)"),
    "config removed": _files(lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
    # configs
    "another architecture": _config(
        "none", _set_fields(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM is not supp"
    ),
    "more layers than files": _config("none", _set_fields(num_hidden_layers=5), r"model\.layers\.4\.\*, expected 5"),
    "fewer layers than files": _config(
        "none", _set_fields(num_hidden_layers=2, num_nextn_predict_layers=0), r"\d+ tensors\) are in"
    ),
    "more experts than files": _config("none", _set_fields(n_routed_experts=9), r"experts\.8\.\*, expected 9"),
    "another vocabulary": _config(
        "none", _set_fields(vocab_size=65), r"embed_tokens\.weight: found shape \(64, 48\), expected"
    ),
    "another method": _config("none", _set_fields(quantization_config={"quant_method": "awq"}), "awq"),
}
