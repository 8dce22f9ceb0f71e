"""Attention of ragged new tokens over paged KV.

Floor: decode reads every key and value once, 2 · kv_len · num_kv_heads · head_dim elements per sequence, limited by
memory; a prompt chunk of n computes 4 · n · kv_len · num_heads · head_dim FLOPs, limited by arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nextn.kernels import gpu, native
from nextn.kernels.attention_layout import AttentionLayout, QueryGroup, make_attention_layout
from nextn.kernels.fp8_quantize import quantize_per_group
from nextn.kernels.paged_attention_triton import TRITON_HEAD_DIMS, launch_attention

__all__ = ["AttentionLayout", "make_attention_layout", "paged_attention", "paged_attention_quantized"]

NATIVE_HEAD_DIMS = (16, 32, 64, 128)
MAX_FOLDED_QUERIES = 32
"""Up to this many new tokens, the query heads of one KV head are folded into one matrix product."""


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    *,
    next_weight: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Grouped-query attention (Ainslie et al., 2023) of new tokens over paged keys and values.

    q: [T, num_heads, head_dim]; rows may be further apart than they are long
    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] in q's dtype or float8_e4m3fn, the new tokens'
        entries written already
    scale: what scores are multiplied by, > 0
    next_weight: what the result is multiplied by next; a GPU asks for its beginning where keys leave memory idle
    batch_invariant: add in an order that depends on the token's position alone
    Returns [T, num_heads, head_dim] in q's dtype; softmax in float32. A token that sees no key gets zeros; rows that
    belong to no sequence are not written.
    """
    if gpu.suits(q, k_cache, v_cache) and q.shape[2] in TRITON_HEAD_DIMS:
        return launch_attention(q, k_cache, v_cache, layout, scale, next_weight, batch_invariant=batch_invariant)[0]
    if (
        native.cpu is not None
        and q.dtype == torch.float32
        and native.suits(k_cache)
        and native.suits(v_cache)
        and q.shape[2] in NATIVE_HEAD_DIMS
        and q.stride()[1:] == (q.shape[2], 1)
    ):
        out = q.new_empty(q.shape)
        native.cpu.paged_attention(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q.shape[1],
            k_cache.shape[2],
            q.shape[2],
            layout.page_size,
            layout.starts.shape[0],
            layout.starts.data_ptr(),
            layout.cu_seqlens_q.data_ptr(),
            layout.page_table.data_ptr(),
            layout.page_table.shape[1],
            layout.first_key,
            scale,
            out.data_ptr(),
        )
        return out
    groups = layout.groups
    if len(groups) == 1 and groups[0].rows == slice(0, q.shape[0]):
        return _attend(q, k_cache, v_cache, groups[0], scale)
    out = q.new_empty(q.shape)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], k_cache, v_cache, group, scale)
    return out


def paged_attention_quantized(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    *,
    next_weight: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``paged_attention``, and each head's result quantized in the same pass, as ``quantize_per_group`` would.

    Returns [T, num_heads · head_dim] float8_e4m3fn, and scales [T, num_heads] float32.
    """
    if gpu.suits(q, k_cache, v_cache) and q.shape[2] in TRITON_HEAD_DIMS:
        out, scales = launch_attention(
            q, k_cache, v_cache, layout, scale, next_weight, quantize=True, batch_invariant=batch_invariant
        )
        assert scales is not None, "they were asked for"
        return out.view(q.shape[0], -1), scales
    attended = paged_attention(q, k_cache, v_cache, layout, scale)
    return quantize_per_group(attended.reshape(q.shape[0], -1), q.shape[2])


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: QueryGroup, scale: float
) -> torch.Tensor:
    b, n = group.num_seqs, group.num_queries
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = k_cache.shape[2]
    num_folded = num_heads // num_kv_heads
    shape = (b, -1, num_kv_heads, head_dim)
    keys, values = (
        cache.index_select(0, group.pages).view(shape)[:, group.keys].transpose(1, 2).to(q.dtype)
        for cache in (k_cache, v_cache)
    )
    bias = group.bias if group.bias is None or q.dtype == torch.float32 else group.bias.to(q.dtype)
    # [B, n, KVH, G, D] → [B, KVH, G, n, D]: all query heads of a KV head side by side
    queries = q.reshape(b, n, num_kv_heads, num_folded, head_dim).permute(0, 2, 3, 1, 4)
    if n <= MAX_FOLDED_QUERIES:
        folded = queries.reshape(b, num_kv_heads, num_folded * n, head_dim)
        if bias is not None and n > 1:
            bias = bias.expand(b, num_folded, n, -1).reshape(b, 1, num_folded * n, -1)
        out = F.scaled_dot_product_attention(folded, keys, values, bias, scale=scale)
        out = out.reshape(b, num_kv_heads, num_folded, n, head_dim)
    else:
        assert bias is not None, "several queries of a sequence see different keys"
        per_head = (b * num_kv_heads, num_folded, -1, head_dim)
        out = F.scaled_dot_product_attention(
            queries.reshape(per_head),
            keys.unsqueeze(2).expand(b, num_kv_heads, num_folded, -1, head_dim).reshape(per_head),
            values.unsqueeze(2).expand(b, num_kv_heads, num_folded, -1, head_dim).reshape(per_head),
            bias.expand(b, num_kv_heads, n, -1).reshape(b * num_kv_heads, 1, n, -1),
            scale=scale,
        ).reshape(b, num_kv_heads, num_folded, n, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(b * n, num_heads, head_dim)
