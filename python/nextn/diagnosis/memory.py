"""Memory per GPU at each tensor-parallel size, from the layout: what each part takes, and what is left for KV."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nextn.checkpoint.header import ITEM_BYTES
from nextn.checkpoint.layout import SCALES, ExpectedTensor, Layout, LinearModule
from nextn.checkpoint.plan import LoadPlan
from nextn.checkpoint.source import Source
from nextn.config.cuts import cut_unit, num_kv_heads_of, share_of, why_not
from nextn.config.model_config import ModelConfig

TP_SIZES = (1, 2, 4, 8, 16)
RESERVED_SHARE = 0.10
"""Of the card, kept for activations, CUDA graphs and the allocator; what is left after weights holds KV."""
KV_BYTES = 2
"""KV in bfloat16."""
MIN_PAGES = 2
"""Of KV, that a server needs to start."""
SCALE_BYTES = 4
"""Of a row of a head that is quantized on load, whose elements take one byte each."""
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
_WHOLE = ("embed_tokens", "norms", "router gate", "router bias", "eh_proj")
"""What every GPU holds."""


@dataclass(frozen=True)
class GpuMemory:
    """One tensor-parallel size.

    parts: bytes of weights on the GPU with the largest share, in the order of PARTS
    kv_bytes_per_token: per GPU, of all layers and the draft's, with the hidden states that the draft is made of;
        kv_tokens: how many fit, 0 if too few for a server to start
    context_length: most tokens of one request: the model's, or as many as fit
    why_not: why the model cannot be cut this way; None if it can
    uneven: linears of which some GPUs hold a block more than others, because blocks are never cut
    """

    tp_size: int
    parts: dict[str, int]
    kv_bytes_per_token: int
    kv_tokens: int
    context_length: int
    fits: bool
    why_not: str | None
    uneven: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(self.parts.values())


def memory_by_tp(plan: LoadPlan, gpu_bytes: float, page_size: int) -> tuple[GpuMemory, ...]:
    """Weights are counted as the files store them (a dequantized draft in two bytes), KV in bfloat16.

    A head that drafts read as FP8 is one of its own, beside the target's. page_size: tokens of a page of KV
    """
    return tuple(_memory(plan, gpu_bytes, page_size, tp) for tp in TP_SIZES)


def _memory(plan: LoadPlan, gpu_bytes: float, page_size: int, tp: int) -> GpuMemory:
    config = plan.source.config
    reason = _why_not(plan, tp)
    sizes = dict.fromkeys(PARTS, 0.0)
    for kind, num_bytes in _sizes(plan.source, plan.layout, config, tp, dequantized=False):
        sizes[_PART_OF.get(kind, "dense and shared MLP")] += num_bytes
    if plan.draft is not None:
        expands = plan.draft.decision.config is not plan.draft.decision.stored
        for kind, num_bytes in _sizes(plan.draft.source, plan.draft.layout, config, tp, dequantized=expands):
            sizes["NextN layer"] += 0 if kind == "lm_head" and plan.draft.has_fp8_head else num_bytes
        if plan.draft.has_fp8_head:
            sizes["NextN layer"] += config.vocab_size * (config.hidden_size + SCALE_BYTES) / tp
    parts = {part: math.ceil(size) for part, size in sizes.items()}
    num_layers = config.num_hidden_layers + (plan.draft is not None)
    per_token = 2 * num_layers * num_kv_heads_of(config, tp) * config.head_dim * KV_BYTES
    if plan.draft is not None:
        per_token += config.hidden_size * KV_BYTES
    left = gpu_bytes * (1 - RESERVED_SHARE) - sum(parts.values())
    fits = reason is None and left >= MIN_PAGES * page_size * per_token
    kv_tokens = int(left // per_token) if fits else 0
    context_length = min(config.max_position_embeddings, kv_tokens // page_size * page_size)
    uneven = tuple(_by_reason(plan, lambda linear: _uneven(linear, tp))) if reason is None else ()
    return GpuMemory(tp, parts, per_token, kv_tokens, context_length, fits, reason, uneven)


def _sizes(
    source: Source, layout: Layout, config: ModelConfig, tp: int, *, dequantized: bool
) -> Iterator[tuple[str, float]]:
    """(kind, bytes per GPU) of every tensor."""
    for linear in layout.linears:
        share, share_of_kv = _share(linear, config, tp)
        for tensor in linear.tensors():
            is_kv = ".k_proj." in tensor.name or ".v_proj." in tensor.name
            part = 1 if _is_whole(linear, tensor) else share_of_kv if is_kv else share
            yield linear.kind, _stored_bytes(source, tensor, dequantized) * part
    for tensor in layout.others:
        yield tensor.kind, _stored_bytes(source, tensor, dequantized) * (1 if tensor.kind in _WHOLE else 1 / tp)


def _stored_bytes(source: Source, tensor: ExpectedTensor, dequantized: bool) -> int:
    if dequantized and tensor.scheme.is_quantized:
        return 0 if tensor.role in ("scale", "input_scale") else math.prod(tensor.shape) * 2
    if source.index is not None:
        return source.index.tensors[tensor.name].num_bytes
    return math.prod(tensor.shape) * ITEM_BYTES["F8_E4M3" if tensor.scheme.is_quantized else "BF16"]


def _share(linear: LinearModule, config: ModelConfig, tp: int) -> tuple[float, float]:
    """The largest part of a linear's weights, and of keys' and values', that one GPU holds. KV heads are repeated."""
    if linear.kind in _WHOLE:
        return 1, 1
    if linear.kind in ("qkv_proj", "o_proj"):
        return 1 / tp, 1 / min(tp, config.num_key_value_heads)
    size, unit = _cut(linear)
    num_units = -(-size // unit)
    share = min(-(-num_units // tp) * unit, size) / size
    return share, share


def _is_whole(linear: LinearModule, tensor: ExpectedTensor) -> bool:
    """Scales that belong to all of a linear's inputs, where it is cut by these, or to all of the matrix."""
    if tensor.role not in SCALES or linear.scheme.block is not None:
        return False
    return linear.kind in _BY_INPUT or not tensor.shape


def _cut(linear: LinearModule) -> tuple[int, int]:
    """The intermediate size that a linear of an MLP is cut along, and what shares of it are multiples of."""
    along_input, block = linear.kind in _BY_INPUT, linear.scheme.block
    size = linear.in_features if along_input else linear.shards[0][1]
    return size, cut_unit([None if block is None else block[along_input]])


def _why_not(plan: LoadPlan, tp: int) -> str | None:
    if (reason := why_not(plan.source.config, tp)) is not None:
        return reason
    return next(_by_reason(plan, lambda linear: _too_few(linear, plan.source.config, tp)), None)


def _too_few(linear: LinearModule, config: ModelConfig, tp: int) -> str | None:
    """Why a linear cannot be cut, such as "1408 has 11 blocks of 128"."""
    if tp == 1 or linear.kind in _WHOLE:
        return None
    if linear.kind not in ("qkv_proj", "o_proj"):
        size, unit = _cut(linear)
        num_units = -(-size // unit)
        return f"{size} has {num_units} pieces of {unit}" if num_units < tp else None
    block = linear.scheme.block
    if block is None:
        return None
    counts = {config.num_attention_heads // tp, num_kv_heads_of(config, tp)}
    for rows in sorted(count * config.head_dim for count in counts):
        if rows % block[linear.kind == "o_proj"]:
            return f"a GPU's heads have {rows} rows, no multiple of blocks of {block[linear.kind == 'o_proj']}"
    return None


def _uneven(linear: LinearModule, tp: int) -> str | None:
    """Words for shares that differ, such as "1536/8 in blocks of 128 is 128 to 256"."""
    if linear.scheme.block is None or linear.kind in _WHOLE or linear.kind in ("qkv_proj", "o_proj"):
        return None
    size, unit = _cut(linear)
    shares = {len(share_of(linear.kind, size, unit, tp, rank)) for rank in range(tp)}
    if len(shares) == 1:
        return None
    return f"{size}/{tp} in blocks of {unit} is {min(shares)} to {max(shares)}"


def _by_reason(plan: LoadPlan, judge: Callable[[LinearModule], str | None]) -> Iterator[str]:
    """Each reason that ``judge`` has against a linear, with the kinds of linears it holds for."""
    layouts = [plan.layout, *([plan.draft.layout] if plan.draft is not None else [])]
    kinds: dict[str, dict[str, None]] = {}
    for linear in (linear for layout in layouts for linear in layout.linears):
        if reason := judge(linear):
            kinds.setdefault(reason, {})[linear.kind] = None
    return (f"{reason} ({', '.join(of_reason)})" for reason, of_reason in kinds.items())
