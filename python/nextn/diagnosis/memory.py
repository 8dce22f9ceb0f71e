"""Memory per GPU at each tensor-parallel size, from the layout: what each part takes, and what is left for KV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nextn.checkpoint.header import ITEM_BYTES
from nextn.checkpoint.layout import ExpectedTensor, Layout, LinearModule
from nextn.checkpoint.plan import LoadPlan
from nextn.checkpoint.source import Source
from nextn.config.model_config import ModelConfig

TP_SIZES = (1, 2, 4, 8, 16)
RESERVED_SHARE = 0.10
"""Of the card, kept for activations, CUDA graphs and the allocator; what is left after weights holds KV."""
KV_BYTES = 2
"""KV in bfloat16."""
PARTS = ("attention", "experts", "dense and shared MLP", "embedding and head", "norms and router", "NextN layer")
_PART_OF = {
    "qkv_proj": "attention",
    "o_proj": "attention",
    "experts.w13": "experts",
    "experts.w2": "experts",
    "embed_tokens": "embedding and head",
    "lm_head": "embedding and head",
    "norms": "norms and router",
    "router gate": "norms and router",
    "router bias": "norms and router",
}
_BY_INPUT = ("o_proj", "experts.w2", "mlp.down_proj", "shared_experts.down_proj")
"""Linears that are cut along their input; all others are cut along their output, except eh_proj, which is whole."""


@dataclass(frozen=True)
class GpuMemory:
    """One tensor-parallel size.

    parts: bytes of weights per GPU, in the order of PARTS
    kv_bytes_per_token: per GPU, of all layers and the draft's, with the GPU's share of the hidden states that the draft
        is made of; kv_tokens: how many fit, 0 if the weights do not
    why_not: why the model cannot be cut this way; None if it can
    misaligned: block-FP8 linears whose cut falls inside a block
    """

    tp_size: int
    parts: dict[str, int]
    kv_bytes_per_token: int
    kv_tokens: int
    fits: bool
    why_not: str | None
    misaligned: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(self.parts.values())


def memory_by_tp(plan: LoadPlan, gpu_bytes: float) -> tuple[GpuMemory, ...]:
    """Weights are counted as the files store them (a dequantized draft in two bytes), KV in bfloat16."""
    return tuple(_memory(plan, gpu_bytes, tp) for tp in TP_SIZES)


def _memory(plan: LoadPlan, gpu_bytes: float, tp: int) -> GpuMemory:
    config = plan.source.config
    sizes = dict.fromkeys(PARTS, 0.0)
    for kind, num_bytes in _sizes(plan.source, plan.layout, config, tp, dequantized=False):
        sizes[_PART_OF.get(kind, "dense and shared MLP")] += num_bytes
    if plan.draft is not None:
        expands = plan.draft.decision.config is not plan.draft.decision.stored
        for _, num_bytes in _sizes(plan.draft.source, plan.draft.layout, config, tp, dequantized=expands):
            sizes["NextN layer"] += num_bytes
    parts = {part: math.ceil(size) for part, size in sizes.items()}
    num_layers = config.num_hidden_layers + (plan.draft is not None)
    per_token = 2 * num_layers * math.ceil(config.num_key_value_heads / tp) * config.head_dim * KV_BYTES
    if plan.draft is not None:
        per_token += math.ceil(config.hidden_size / tp) * KV_BYTES
    left = gpu_bytes * (1 - RESERVED_SHARE) - sum(parts.values())
    why_not = _why_not(config, tp)
    fits = why_not is None and left >= per_token
    return GpuMemory(
        tp, parts, per_token, int(left // per_token) if fits else 0, fits, why_not, tuple(_misaligned(plan, tp))
    )


def _sizes(
    source: Source, layout: Layout, config: ModelConfig, tp: int, *, dequantized: bool
) -> Iterator[tuple[str, float]]:
    """(kind, bytes per GPU) of every tensor."""
    for tensor in layout.tensors():
        yield tensor.kind, _stored_bytes(source, tensor, dequantized) * _share(tensor, config, tp)


def _stored_bytes(source: Source, tensor: ExpectedTensor, dequantized: bool) -> int:
    if dequantized and tensor.scheme.is_quantized:
        return 0 if tensor.role in ("scale", "input_scale") else math.prod(tensor.shape) * 2
    if source.index is not None:
        return source.index.tensors[tensor.name].num_bytes
    return math.prod(tensor.shape) * ITEM_BYTES["F8_E4M3" if tensor.scheme.is_quantized else "BF16"]


def _share(tensor: ExpectedTensor, config: ModelConfig, tp: int) -> float:
    """The part of a tensor that one GPU holds. KV heads are repeated where there are more GPUs than heads."""
    if tensor.kind in ("norms", "router gate", "router bias", "eh_proj"):
        return 1
    if ".k_proj." in tensor.name or ".v_proj." in tensor.name:
        return 1 / min(tp, config.num_key_value_heads)
    return 1 / tp


def _why_not(config: ModelConfig, tp: int) -> str | None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tp:
        return f"{heads} heads do not divide by {tp}"
    if kv_heads % tp and tp % kv_heads:
        return f"{kv_heads} KV heads neither divide by {tp} nor into it"
    for name in ("intermediate_size", "moe_intermediate_size"):
        if getattr(config, name) % tp:
            return f"{name} {getattr(config, name)} does not divide by {tp}"
    return None


def _misaligned(plan: LoadPlan, tp: int) -> list[str]:
    layouts = [plan.layout, *([plan.draft.layout] if plan.draft is not None else [])]
    kinds: dict[str, dict[str, None]] = {}
    for linear in (linear for layout in layouts for linear in layout.linears):
        if reason := _misaligned_linear(linear, plan, tp):
            kinds.setdefault(reason, {})[linear.kind] = None
    return [f"{reason} ({', '.join(of_reason)})" for reason, of_reason in kinds.items()]


def _misaligned_linear(linear: LinearModule, plan: LoadPlan, tp: int) -> str | None:
    """Words for a cut inside a block, such as "1536/8 = 192 is no multiple of 128"."""
    block = linear.scheme.block
    if block is None or tp == 1 or linear.kind == "eh_proj":
        return None
    along_input = linear.kind in _BY_INPUT
    for name, rows in linear.shards[: linear.num_fused]:
        is_kv = name.endswith((".k_proj", ".v_proj"))
        cuts = min(tp, plan.source.config.num_key_value_heads) if is_kv else tp
        size, of_block = (linear.in_features, block[1]) if along_input else (rows, block[0])
        if cuts > 1 and (size % cuts or (size // cuts) % of_block):
            return f"{size}/{cuts} = {size / cuts:g} is no multiple of {of_block}"
    return None
