"""SwiGLU MLPs (Shazeer, 2020): a mixture of routed and shared experts, and the dense one.

Floor: the weights of each expert that is touched, read once: 3 · I · H elements; limited by memory until an expert sees
a few hundred tokens. ``expert_terms`` is for GPUs: a few launches, whose sizes depend on nothing but shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import gpu, native
from nextn.kernels.fp8_quantize import quantize_per_group, quantize_per_token
from nextn.kernels.linear import PackedWeight, linear
from nextn.kernels.moe_align import moe_align
from nextn.kernels.moe_combine import ExpertTerms
from nextn.kernels.moe_matmul import choose_config, expert_matmul
from nextn.kernels.silu_mul import silu_mul


@dataclass(frozen=True)
class PackedExperts:
    """The matrices of E routed experts, and of a shared one that every token takes with weight 1 (None without one).

    w13: [2I, H] each, the gate's rows first; w2: [H, I] each
    addresses: [2, E + 1] int64, of all descriptors, w13's first; None where the compiled kernel does not serve them
    """

    w13: tuple[PackedWeight, ...]
    w2: tuple[PackedWeight, ...]
    shared: tuple[PackedWeight, PackedWeight] | None
    addresses: torch.Tensor | None


def pack_experts(
    w13: tuple[PackedWeight, ...], w2: tuple[PackedWeight, ...], shared: tuple[PackedWeight, PackedWeight] | None
) -> PackedExperts:
    """Put routed and shared experts together. With no routed ones it is a dense MLP."""
    all_w13 = [*w13, *([shared[0]] if shared else [])]
    all_w2 = [*w2, *([shared[1]] if shared else [])]
    addresses = [[weight.address for weight in row] for row in (all_w13, all_w2)]
    table = torch.tensor(addresses, device="cpu") if all(map(all, addresses)) else None
    return PackedExperts(w13, w2, shared, table)


def fused_moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: PackedExperts,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)), plus the shared expert (plus residual).

    x: [T, H]; expert_ids: [T, K] int64; expert_weights: [T, K] float32; residual: [T, H]
    Returns [T, H] in x's dtype.
    """
    if experts.addresses is not None and native.cpu is not None and native.suits(x):
        return _native(x, expert_ids.data_ptr(), expert_weights.data_ptr(), expert_ids.shape[1], experts, residual)
    out = _routed(x, expert_ids, expert_weights, experts)
    if experts.shared is not None:
        out += _swiglu(x, *experts.shared)
    return out if residual is None else out + residual


def dense_mlp(x: torch.Tensor, mlp: PackedExperts, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The shared expert alone, which is a dense MLP. x, residual: [T, H]. Returns [T, H] in x's dtype."""
    if mlp.addresses is not None and native.cpu is not None and native.suits(x):
        return _native(x, 0, 0, 0, mlp, residual)
    assert mlp.shared is not None, "a dense MLP is packed as a shared expert"
    out = _swiglu(x, *mlp.shared)
    return out if residual is None else out + residual


def _native(
    x: torch.Tensor, ids: int, weights: int, top_k: int, experts: PackedExperts, residual: torch.Tensor | None
) -> torch.Tensor:
    assert native.cpu is not None, "the caller has looked"
    assert experts.addresses is not None, "the caller has looked"
    out = torch.empty_like(x)
    w13 = experts.addresses.data_ptr()
    native.cpu.fused_moe(
        w13,
        w13 + experts.addresses.stride(0) * experts.addresses.itemsize,
        len(experts.w13),
        experts.shared is not None,
        x.data_ptr(),
        x.shape[0],
        top_k,
        ids,
        weights,
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
    )
    return out


def _swiglu(x: torch.Tensor, w13: PackedWeight, w2: PackedWeight) -> torch.Tensor:
    return linear(silu_mul(linear(x, w13)), w2)


def _routed(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, experts: PackedExperts
) -> torch.Tensor:
    """Tokens sorted by expert, so that each expert's weights are read once, without copying them."""
    num_tokens, top_k = expert_ids.shape
    num_pairs = num_tokens * top_k
    ordered, order = expert_ids.view(-1).sort(stable=True)
    chosen, sizes = _runs(ordered.tolist())
    gate_up = x.new_empty(num_pairs, experts.w13[0].num_rows)
    down = x.new_empty(num_pairs, experts.w2[0].num_rows)
    sources = x.index_select(0, order // top_k).split(sizes)
    for expert, source, out in zip(chosen, sources, gate_up.split(sizes), strict=True):
        torch.mm(source, experts.w13[expert].transposed, out=out)
    activated = silu_mul(gate_up).split(sizes)
    for expert, source, out in zip(chosen, activated, down.split(sizes), strict=True):
        torch.mm(source, experts.w2[expert].transposed, out=out)
    # Back to token order, so that a token's sum does not depend on what else is in the batch.
    in_token_order = torch.empty_like(down).index_copy_(0, order, down)
    return torch.bmm(expert_weights[:, None].to(x.dtype), in_token_order.view(num_tokens, top_k, -1))[:, 0]


def _runs(ordered: list[int]) -> tuple[list[int], list[int]]:
    """The distinct values of a sorted list, and how often each occurs."""
    counts: dict[int, int] = {}
    for value in ordered:
        counts[value] = counts.get(value, 0) + 1
    return list(counts), list(counts.values())


@dataclass(frozen=True)
class StackedExperts:
    """The matrices of E routed experts, and of a shared one behind them that every token takes with weight 1.

    w13: [E (+ 1), 2I, H], the gate's rows first; w2: [E (+ 1), H, I]
    w13_scale, w2_scale: where the matrices are float8_e4m3fn, [·, 2I or H, 1] float32; or with ``block``
        [·, 2⌈I / block_n⌉, ⌈H / block_k⌉] and [·, ⌈H / block_n⌉, ⌈I / block_k⌉]: gate and up have blocks of their own
    num_routed: E
    quantizes_input: whether activations meet float8 matrices quantized, on cards with FP8 units
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor | None
    w2: torch.Tensor
    w2_scale: torch.Tensor | None
    block: tuple[int, int] | None
    num_routed: int
    has_shared: bool
    quantizes_input: bool = True


def expert_terms(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: StackedExperts,
    residual: torch.Tensor | None = None,
    *,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    batch_invariant: bool = False,
) -> ExpertTerms:
    """The terms of Σ over a token's experts of weight · down(silu(gate(x)) · up(x)), the shared expert and residual.

    ``moe_combine`` adds them up, or the norm that follows.

    FP8 matrices meet activations that are quantized per token, or per group of block_k columns; wide ones on cards
    without FP8 units, and where experts.quantizes_input says no. Products are summed in float32; silu · up and an
    expert's result are rounded to x's dtype.

    x: [T, H] bfloat16 or float16; expert_ids: [T, K] int64; expert_weights: [T, K] float32; residual: [T, H]
    quantized: x as it would be quantized here, and its scales, where the caller has them
    batch_invariant: cut up the products without regard to T, so that a token's result does not depend on its batch
    """
    num_tokens, top_k = expert_ids.shape
    has_units = not gpu.suits(x) or gpu.has_fp8_units(x.device)
    is_quantized = experts.quantizes_input and experts.w13_scale is not None and has_units
    config = choose_config(num_tokens, top_k, experts.num_routed, experts.block, batch_invariant=batch_invariant)
    alignment = moe_align(expert_ids, experts.num_routed, config.block_m, has_shared=experts.has_shared)

    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not is_quantized:
            return rows, None
        return quantize_per_token(rows) if experts.block is None else quantize_per_group(rows, experts.block[1])

    rows, scale = quantized if is_quantized and quantized is not None else quantize(x.contiguous())
    block, dtype = experts.block, x.dtype
    activated = expert_matmul(
        rows, scale, experts.w13, experts.w13_scale, block, alignment, config, swiglu=True, out_dtype=dtype
    )
    rows, scale = quantize(activated)
    pairs = expert_matmul(
        rows,
        scale,
        experts.w2,
        experts.w2_scale,
        block,
        alignment,
        config,
        swiglu=False,
        out_dtype=dtype,
        experts_are_old=True,
    )
    return ExpertTerms(pairs, expert_weights, residual)
