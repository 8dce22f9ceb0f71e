"""Writing and reading the folder of the embedded checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from nextn.demo.chat_template import CHAT_TEMPLATE
from nextn.demo.modeling import EXPERTS_IMPLEMENTATION, NextN
from nextn.demo.quantize import Tensors, compress, decompress, ignore_list, module_names, nextn_names
from nextn.demo.tokenizer import EOS_TOKENS, MARKUP_TOKENS, SPECIAL_TOKENS

TARGET_FILE = "model.safetensors"
NEXTN_FILE = "mtp.safetensors"


def _quantization_config(names: list[str], layer: int) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**number, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = {**number, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignore_list(names, layer),
        "config_groups": {"group_0": group},
    }


def official_config(config: Glm4MoeConfig, names: list[str]) -> dict[str, Any]:
    """config.json with the fields of the official FP8 checkpoints, in their order."""
    fields = [
        "attention_bias", "attention_dropout", "eos_token_id", "pad_token_id", "head_dim", "hidden_act",
        "initializer_range", "model_type", "norm_topk_prob", "num_attention_heads", "num_key_value_heads", "n_group",
        "topk_group", "n_shared_experts", "num_experts_per_tok", "num_nextn_predict_layers", "rms_norm_eps",
        "tie_word_embeddings", "use_cache", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
        "num_hidden_layers", "n_routed_experts", "first_k_dense_replace", "routed_scaling_factor", "use_qk_norm",
        "max_position_embeddings",
    ]  # fmt: skip
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        **{field: getattr(config, field) for field in fields},
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "bfloat16",
        "quantization_config": _quantization_config(names, config.num_hidden_layers),
    }


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS)
    }  # fmt: skip
    return {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": SPECIAL_TOKENS,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_checkpoint(out: Path, tokenizer: Tokenizer, target: Glm4MoeForCausalLM, nextn: NextN) -> None:
    """Quantize both models and write every file but the model card."""
    config = target.config
    layer = config.num_hidden_layers
    files = {
        TARGET_FILE: compress(dict(target.state_dict())),
        NEXTN_FILE: compress(nextn_names(dict(nextn.state_dict()), layer)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    size = sum(tensor.numel() * tensor.element_size() for tensors in files.values() for tensor in tensors.values())
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_json(out / "config.json", official_config(config, list(weight_map)))
    generation = {
        "_from_model_config": True, "do_sample": True, "temperature": 0.6, "top_p": 0.95,
        "eos_token_id": [tokenizer.token_to_id(token) for token in EOS_TOKENS], "pad_token_id": config.pad_token_id,
    }  # fmt: skip
    _write_json(out / "generation_config.json", generation)
    _write_json(out / "tokenizer_config.json", _tokenizer_config(tokenizer, config.max_position_embeddings))
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def serving_weights(target: Glm4MoeForCausalLM) -> Tensors:
    """The target's weights as a server sees them, after quantizing and expanding again."""
    return decompress(compress(dict(target.state_dict())))


def load_models(folder: Path) -> tuple[Glm4MoeForCausalLM, NextN]:
    """Both models in float32 with the weights that the checkpoint's codes stand for."""
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    config = Glm4MoeConfig(**{key: value for key, value in fields.items() if key != "torch_dtype"})
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    with torch.device("cpu"):
        target, nextn = Glm4MoeForCausalLM(config).float(), NextN(config).float()
    target.load_state_dict(decompress(load_file(folder / TARGET_FILE)))
    nextn.load_state_dict(module_names(decompress(load_file(folder / NEXTN_FILE)), config.num_hidden_layers))
    return target.eval(), nextn.eval()
