"""Entries of a quantization config's list of excluded modules must name something.

An entry in another naming scheme (runtime names, a missing "model.", the layer number off by one) excludes nothing, and
servers that trust the list then take a module for FP8 that is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from nextn.config.model_config import ModelConfig
from nextn.errors import QuantizationError
from nextn.quantization.scheme import QuantizationConfig

MODEL_PARTS = ("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb")
LAYER_PARTS = (
    *("input_layernorm", "post_attention_layernorm"),
    *(
        f"self_attn.{part}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", "attn")
    ),
    *(f"mlp.{part}" for part in ("gate", "gate_proj", "up_proj", "down_proj", "act_fn", "experts")),
    *(f"mlp.shared_experts.{part}" for part in ("gate_proj", "up_proj", "down_proj", "act_fn")),
)
NEXTN_PARTS = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")


def check_ignores(
    quantization: QuantizationConfig | None,
    config: ModelConfig,
    tensor_names: Iterable[str],
    *,
    has_target: bool = True,
) -> None:
    """Every entry names a module of the files, or one that GLM-4.x MoE models have in a layer that config.json names.

    Official lists name modules that are no linears, and optional ones of the NextN layer that this checkpoint may lack.
    has_target: False if the files may be those of the NextN layer alone
    Raises QuantizationError naming the entry, and a module that it may stand for.
    """
    if quantization is None:
        return
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensor_names)
    modules |= dict.fromkeys(_architecture(config, has_target))
    wrong = quantization.unmatched_ignores(modules)
    if not wrong:
        return
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise QuantizationError(
        f"{wrong[0]}{more} names no module of this checkpoint, so it excludes nothing; entries are matched against "
        "checkpoint names such as model.layers.3.self_attn.o_proj: correct it or remove it" + _guess(wrong[0], modules)
    )


def _architecture(config: ModelConfig, has_target: bool) -> Iterable[str]:
    """Module names, the NextN layer's included: its entries may be left over where the layer was removed.

    Other layers' experts are looked up in the files, where these are there.
    """
    yield from MODEL_PARTS
    for layer in range(config.num_hidden_layers + 1):
        yield from (f"model.layers.{layer}.{part}" for part in LAYER_PARTS)
    last = f"model.layers.{config.num_hidden_layers}"
    yield from (f"{last}.{part}" for part in NEXTN_PARTS)
    for layer in range(config.num_hidden_layers if has_target else 0, config.num_hidden_layers + 1):
        for expert in range(config.n_routed_experts):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            yield from (f"{name}.{part}_proj" for part in ("gate", "up", "down"))


def _guess(complaint: str, modules: Iterable[str]) -> str:
    entry = complaint.rpartition(" entry ")[2].strip("'\"")
    if entry.startswith("re:"):
        return ""
    meant = next((name for name in modules if name.endswith(f".{entry}") or entry.endswith(f".{name}")), None)
    return f" (did you mean {meant!r}?)" if meant else ""
