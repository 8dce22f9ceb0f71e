"""Small random checkpoints, written to disk as published ones are, and their dequantized twins for oracles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

State = dict[str, torch.Tensor]
Quant = Literal["none", "channel", "tensor", "tensor_static", "block", "ct_block"]
Draft = Literal["same", "bf16_ignored", "bf16_regex", "bf16_no_scales", "absent"]

BLOCK = (16, 16)
FP8_MAX = 448.0


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json of a model that runs in a millisecond, with every feature on."""
    config: dict[str, Any] = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "head_dim": 16,
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "max_position_embeddings": 512,
    }
    return {**config, **overrides}


def random_state(
    config: dict[str, Any], seed: int = 0, *, own_head: bool = False, own_embedding: bool = False
) -> State:
    """float32 tensors under their published names; norms near 1, nothing zero or constant."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, vocab = config["head_dim"], config["vocab_size"]
    state: State = {}

    def linear(name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * 1.5 / columns**0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.3

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)

    def mlp(name: str, inner: int) -> None:
        linear(f"{name}.gate_proj", inner, hidden)
        linear(f"{name}.up_proj", inner, hidden)
        linear(f"{name}.down_proj", hidden, inner)

    def layer(index: int) -> None:
        name = f"model.layers.{index}"
        norm(f"{name}.input_layernorm", hidden)
        norm(f"{name}.post_attention_layernorm", hidden)
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            linear(f"{name}.self_attn.{part}_proj", rows * head_dim, hidden, bias=config["attention_bias"])
        linear(f"{name}.self_attn.o_proj", hidden, heads * head_dim)
        if config["use_qk_norm"]:
            norm(f"{name}.self_attn.q_norm", head_dim)
            norm(f"{name}.self_attn.k_norm", head_dim)
        if index < config["first_k_dense_replace"]:
            mlp(f"{name}.mlp", config["intermediate_size"])
            return
        linear(f"{name}.mlp.gate", config["n_routed_experts"], hidden)
        bias = torch.randn(config["n_routed_experts"], generator=generator) * 0.3
        state[f"{name}.mlp.gate.e_score_correction_bias"] = bias
        for expert in range(config["n_routed_experts"]):
            mlp(f"{name}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            mlp(f"{name}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])

    state["model.embed_tokens.weight"] = torch.randn(vocab, hidden, generator=generator)
    for index in range(config["num_hidden_layers"]):
        layer(index)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", vocab, hidden)
    if config["num_nextn_predict_layers"]:
        last = config["num_hidden_layers"]
        layer(last)
        name = f"model.layers.{last}"
        linear(f"{name}.eh_proj", hidden, 2 * hidden)
        for part in ("enorm", "hnorm", "shared_head.norm"):
            norm(f"{name}.{part}", hidden)
        if own_head:
            linear(f"{name}.shared_head.head", vocab, hidden)
        if own_embedding:
            state[f"{name}.embed_tokens.weight"] = torch.randn(vocab, hidden, generator=generator)
    return state


def is_quantizable(name: str) -> bool:
    """Whether official FP8 checkpoints hold this tensor as FP8: attention, experts and dense MLPs."""
    return name.endswith("_proj.weight") and not name.endswith("eh_proj.weight")


def quantized(state: State, quant: Quant, dtype: torch.dtype, keep: Callable[[str], bool]) -> State:
    """Replace each quantizable weight by codes and scales; everything else, and what ``keep`` names, goes to dtype."""
    out: State = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if name.endswith("e_score_correction_bias"):
            out[name] = tensor
        elif quant == "none" or not is_quantizable(name) or keep(name):
            out[name] = tensor.to(dtype)
        elif quant in ("block", "ct_block"):
            rows, columns = -(-tensor.shape[0] // BLOCK[0]), -(-tensor.shape[1] // BLOCK[1])
            scale = torch.empty(rows, columns)
            codes = torch.empty(tensor.shape)
            for i in range(rows):
                for j in range(columns):
                    part = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
                    scale[i, j] = tensor[part].abs().max() / FP8_MAX
                    codes[part] = tensor[part] / scale[i, j]
            out[name] = codes.to(torch.float8_e4m3fn)
            out[f"{module}.{'weight_scale_inv' if quant == 'block' else 'weight_scale'}"] = scale
        else:
            amax = tensor.abs().amax(1, keepdim=True) if quant == "channel" else tensor.abs().max().view(1)
            out[name] = (tensor / (amax / FP8_MAX)).to(torch.float8_e4m3fn)
            out[f"{module}.weight_scale"] = amax / FP8_MAX
            if quant == "tensor_static":
                out[f"{module}.input_scale"] = torch.full((1,), 0.02)
    return out


def dequantized(stored: State) -> State:
    """float32 tensors without scales: codes times scales, written out by the definition of each format."""
    out: State = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        values = tensor.float()
        module = name.removesuffix(".weight")
        scale = stored.get(f"{module}.weight_scale", stored.get(f"{module}.weight_scale_inv"))
        if tensor.dtype == torch.float8_e4m3fn and scale is not None:
            if scale.dim() == 2 and scale.shape[0] < tensor.shape[0]:
                rows = scale.repeat_interleave(BLOCK[0], 0)[: tensor.shape[0]]
                scale = rows.repeat_interleave(BLOCK[1], 1)[:, : tensor.shape[1]]
            values = values * scale
        out[name] = values
    return out


def quantization_config(quant: Quant, config: dict[str, Any], draft: Draft) -> dict[str, Any] | None:
    """What config.json says for these tensors."""
    last = f"model.layers.{config['num_hidden_layers']}"
    if quant == "none":
        return None
    if quant == "block":
        excluded = ["lm_head"] + ([last] if draft in ("bf16_ignored", "bf16_regex") else [])
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": excluded,
        }
    ignore = ["lm_head", "model.embed_tokens", f"{last}.eh_proj"]
    ignore += [
        f"model.layers.{i}.mlp.gate" for i in range(config["first_k_dense_replace"], config["num_hidden_layers"] + 1)
    ]
    if draft == "bf16_regex":
        ignore.append(f"re:model\\.layers\\.{config['num_hidden_layers']}\\..*")
    if draft == "bf16_ignored":
        experts = [f"mlp.experts.{e}" for e in range(config["n_routed_experts"])] + ["mlp.shared_experts"]
        ignore += [f"{last}.{e}.{p}_proj" for e in experts for p in ("gate", "up", "down")]
        ignore += [f"{last}.self_attn.{p}_proj" for p in "qkvo"]
    strategy = {"channel": "channel", "tensor": "tensor", "tensor_static": "tensor", "ct_block": "block"}[quant]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    if quant == "ct_block":
        weights["block_structure"] = list(BLOCK)
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    if quant == "tensor_static":
        activations |= {"strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ignore,
    }


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    quant: Quant = "none",
    draft: Draft = "same",
    mtp_file: bool = True,
    in_index: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    own_head: bool = False,
    own_embedding: bool = False,
    seed: int = 0,
    state: State | None = None,
    mutate: Callable[[State], None] | None = None,
    mutate_config: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write config.json, safetensors files and an index.

    draft: how layer N is stored where the rest is FP8, and whether config.json says so
    mtp_file: layer N in a file of its own; in_index: whether the index names that file
    state: float32 tensors to store instead of random ones
    mutate: changes the tensors just before they are written; mutate_config: the same for config.json
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"model.layers.{config['num_hidden_layers']}."
    full = state if state is not None else random_state(config, seed, own_head=own_head, own_embedding=own_embedding)
    bf16_draft = draft.startswith("bf16")
    stored = quantized(full, quant, dtype, lambda name: bf16_draft and name.startswith(prefix))
    if draft == "absent":
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(prefix)}
    if mutate is not None:
        mutate(stored)
    written = dict(config)
    if (declared := quantization_config(quant, config, draft)) is not None:
        written["quantization_config"] = declared
    if mutate_config is not None:
        mutate_config(written)
    (folder / "config.json").write_text(json.dumps(written))
    of_draft = {name: t.contiguous() for name, t in stored.items() if name.startswith(prefix) and mtp_file}
    of_target = {name: t.contiguous() for name, t in stored.items() if name not in of_draft}
    weight_map = {}
    for file, tensors in (("model.safetensors", of_target), ("mtp.safetensors", of_draft)):
        if tensors:
            save_file(tensors, folder / file)
            if in_index or file == "model.safetensors":
                weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-!"
END_OF_LETTERS = len(LETTERS)
"""The token that ends an output, of a vocabulary of 39."""


def write_letters(folder: Path) -> Path:
    """A tokenizer.json beside a checkpoint: a token for each of LETTERS, and one for the end."""
    backend = BackendTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def said_in_letters(token_ids: list[int]) -> str:
    """What such an output says, without its end."""
    return "".join(LETTERS[token] for token in token_ids if token != END_OF_LETTERS)
