"""Header-only checkpoints of published shapes: safetensors files whose data is a hole that takes no disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Shape = tuple[int, ...]


def published_tensors(config: dict[str, Any], *, own_head: bool, own_embedding: bool) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every tensor but scales, as GLM-4.5, 4.6 and 4.7 are published."""
    hidden, head_dim, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    last = config["num_hidden_layers"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(last + 1):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            yield f"{layer}.self_attn.{part}_proj.weight", (config[heads] * head_dim, hidden)
            yield f"{layer}.self_attn.{part}_proj.bias", (config[heads] * head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, config["num_attention_heads"] * head_dim)
        if config["use_qk_norm"]:
            yield from ((f"{layer}.self_attn.{part}_norm.weight", (head_dim,)) for part in "qk")
        if i < config["first_k_dense_replace"]:
            yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{layer}.mlp.gate.weight", (config["n_routed_experts"], hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from _mlp(f"{layer}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        yield from _mlp(f"{layer}.mlp.shared_experts", hidden, config["moe_intermediate_size"])
    layer = f"model.layers.{last}"
    yield f"{layer}.eh_proj.weight", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{layer}.{norm}.weight", (hidden,)
    if own_embedding:
        yield f"{layer}.embed_tokens.weight", (vocab, hidden)
    if own_head:
        yield f"{layer}.shared_head.head.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _mlp(name: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def _stored(config: dict[str, Any], name: str, shape: Shape) -> Iterator[tuple[str, str, Shape]]:
    """(name, dtype, shape) of a tensor and its scale, quantized as config.json says and published checkpoints are."""
    quantization = config.get("quantization_config")
    if name.endswith("e_score_correction_bias"):
        yield name, "F32", shape
    elif quantization is None or not name.endswith("_proj.weight") or name.endswith("eh_proj.weight"):
        yield name, "BF16", shape
    elif (block := quantization.get("weight_block_size")) is not None:
        yield name, "F8_E4M3", shape
        yield f"{name}_scale_inv", "F32", tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    else:
        yield name, "F8_E4M3", shape
        yield f"{name}_scale", "F32", (shape[0], 1)


def write_headers(
    folder: Path, config: dict[str, Any], *, own_head: bool = False, own_embedding: bool = False, in_index: bool = True
) -> Path:
    """One file per 8 layers and ``mtp.safetensors`` for the NextN layer; ``in_index``: whether the index names that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [
        stored
        for name, shape in published_tensors(config, own_head=own_head, own_embedding=own_embedding)
        for stored in _stored(config, name, shape)
    ]

    def file_of(name: str) -> str:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        return "mtp.safetensors" if layer == config["num_hidden_layers"] else f"model-{layer // 8:05d}.safetensors"

    weight_map = {name: file_of(name) for name, _, _ in tensors}
    for file, group in groupby(sorted(tensors, key=lambda t: file_of(t[0])), key=lambda t: file_of(t[0])):
        _write(folder / file, list(group))
    if not in_index:
        weight_map = {name: file for name, file in weight_map.items() if file != "mtp.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write(path: Path, tensors: list[tuple[str, str, Shape]]) -> None:
    header, end = {}, 0
    for name, dtype, shape in tensors:
        size = BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def published_config(name: str, quant: str = "none") -> dict[str, Any]:
    """The config.json of GLM-4.5-Air, 4.5 or 4.6, with the fields that shape the model.

    quant: "none", "channel" with the official list of excluded modules, or "block"
    """
    is_air = name == "glm-4.5-air"
    config: dict[str, Any] = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
        "head_dim": 128,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151552,
        "hidden_size": 4096 if is_air else 5120,
        "num_hidden_layers": 46 if is_air else 92,
        "intermediate_size": 10944 if is_air else 12288,
        "first_k_dense_replace": 1 if is_air else 3,
        "n_routed_experts": 128 if is_air else 160,
        "moe_intermediate_size": 1408 if is_air else 1536,
        "routed_scaling_factor": 1.0 if is_air else 2.5,
        "use_qk_norm": not is_air,
        "max_position_embeddings": 202752 if name == "glm-4.6" else 131072,
    }
    if quant == "block":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
    if quant == "channel":
        number = {"num_bits": 8, "type": "float", "symmetric": True}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": official_ignores(config),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**number, "strategy": "channel", "dynamic": False},
                    "input_activations": {**number, "strategy": "token", "dynamic": True},
                }
            },
        }
    return config


def official_ignores(config: dict[str, Any]) -> list[str]:
    """As official FP8 checkpoints list them: modules that are no linears too, and optional ones that 4.6 lacks."""
    last = config["num_hidden_layers"]
    entries = ["lm_head", "model.embed_tokens", "model.norm"]
    for i in range(last + 1):
        parts = ["input_layernorm", "post_attention_layernorm"]
        parts += ["self_attn.q_norm", "self_attn.k_norm"] * config["use_qk_norm"]
        parts += ["mlp.gate"] * (i >= config["first_k_dense_replace"])
        entries += [f"model.layers.{i}.{part}" for part in parts]
    parts = ["eh_proj", "embed_tokens", "enorm", "hnorm", "shared_head.norm", "shared_head.head"]
    return entries + [f"model.layers.{last}.{part}" for part in parts]
