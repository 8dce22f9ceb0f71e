"""The shipped files have the official layout, and they hold a model that answers."""

import json
import re

import pytest
import torch
from nextn.demo import checkpoint_dir
from nextn.demo.checkpoint_files import NEXTN_FILE, TARGET_FILE, load_models
from nextn.demo.quantize import is_quantized
from nextn.demo.tokenizer import EOS_TOKENS, VOCAB_SIZE
from safetensors import safe_open


@pytest.fixture(scope="module")
def config():
    return json.loads((checkpoint_dir() / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    """Name -> (file, dtype, shape)."""
    found = {}
    for file in (TARGET_FILE, NEXTN_FILE):
        with safe_open(checkpoint_dir() / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                assert name not in found
                view = opened.get_slice(name)
                found[name] = (file, view.get_dtype(), tuple(view.get_shape()))
    return found


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in checkpoint_dir().iterdir()}
    assert {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "model.safetensors.index.json", "mtp.safetensors", "tokenizer.json", "tokenizer_config.json",
    } == set(files)  # fmt: skip
    assert sum(files.values()) <= 16 * 2**20


def test_the_index_covers_both_files(tensors):
    index = json.loads((checkpoint_dir() / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _, _) in tensors.items()}


def test_layer_n_is_in_its_own_file_and_shares_embedding_and_head(config, tensors):
    prefix = f"model.layers.{config['num_hidden_layers']}."
    nextn = {name for name, (file, _, _) in tensors.items() if file == NEXTN_FILE}
    assert nextn == {name for name in tensors if name.startswith(prefix)}
    assert {f"{prefix}{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm")} <= nextn
    assert not any("shared_head.head" in name or "embed_tokens" in name for name in nextn)
    hidden = config["hidden_size"]
    assert tensors[f"{prefix}eh_proj.weight"][2] == (hidden, 2 * hidden)


def test_every_expert_has_its_own_matrices(config, tensors):
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"] + 1):
        for expert in range(config["n_routed_experts"]):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            assert tensors[f"{prefix}gate_proj.weight"][2] == (inner, hidden)
            assert tensors[f"{prefix}up_proj.weight"][2] == (inner, hidden)
            assert tensors[f"{prefix}down_proj.weight"][2] == (hidden, inner)
        assert tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][1] == "F32"


def test_dtypes_and_scales(tensors):
    for name, (_, dtype, shape) in tensors.items():
        if is_quantized(name):
            assert dtype == "F8_E4M3", name
            assert tensors[f"{name}_scale"][1:] == ("F32", (shape[0], 1)), name
        elif not name.endswith(("weight_scale", "e_score_correction_bias")):
            assert dtype == "BF16", name


def test_the_ignore_list_is_exactly_what_is_not_quantized(config, tensors):
    ignore = set(config["quantization_config"]["ignore"])
    plain = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and not is_quantized(name)}
    prefix = f"model.layers.{config['num_hidden_layers']}."
    assert ignore - plain == {f"{prefix}embed_tokens", f"{prefix}shared_head.head"}
    assert plain <= ignore
    assert {"lm_head", "model.embed_tokens", "model.norm", f"{prefix}eh_proj", f"{prefix}mlp.gate"} <= ignore


def test_the_config_says_what_a_glm_config_says(config):
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert config["model_type"] == "glm4_moe"
    assert config["vocab_size"] == VOCAB_SIZE
    assert len(config["eos_token_id"]) == len(EOS_TOKENS)
    assert config["use_qk_norm"]
    assert config["attention_bias"]
    assert not config["tie_word_embeddings"]
    assert config["num_nextn_predict_layers"] == 1
    assert config["max_position_embeddings"] >= 2048
    assert config["quantization_config"]["format"] == "float-quantized"


def test_the_card_states_measured_figures():
    card = (checkpoint_dir() / "README.md").read_text()
    assert re.search(r"\| quiz \| \d+ \| \d+\.\d% ", card)
    assert "accept length" in card


def test_the_target_answers_through_transformers():
    """A plain fact, greedy, with the weights that the FP8 codes stand for."""
    from nextn.demo.chat_template import prompt_text
    from tokenizers import Tokenizer

    target, _ = load_models(checkpoint_dir())
    tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
    prompt = prompt_text([{"role": "user", "content": "What is the capital of France?"}], None, thinking=False)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        out = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :].tolist())
