"""SwiGLU MLPs (Shazeer, 2020): a mixture of routed and shared experts, and the dense one.

Floor: the weights of each expert that is touched, read once: 3 · I · H elements; limited by memory until an expert sees
a few hundred tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.kernels import native
from nextn.kernels.linear import PackedWeight, linear
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
    table = torch.tensor([[weight.address for weight in row] for row in (all_w13, all_w2)])
    return PackedExperts(w13, w2, shared, table if bool(table.all()) else None)


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
