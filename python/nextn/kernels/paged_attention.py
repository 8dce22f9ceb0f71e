"""Attention of ragged new tokens over paged KV.

Floor: decode reads every key and value once, 2 · kv_len · num_kv_heads · head_dim elements per sequence, limited by
memory; a prompt chunk of n computes 4 · n · kv_len · num_heads · head_dim FLOPs, limited by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F

from nextn.kernels import native

NATIVE_HEAD_DIMS = (16, 32, 64, 128)
MAX_FOLDED_QUERIES = 32
"""Up to this many new tokens, the query heads of one KV head are folded into one matrix product."""


@dataclass(frozen=True)
class AttentionLayout:
    """Where S sequences' new tokens and all their keys are. A query at position p sees the keys first_key … p.

    starts: [S] int64, each sequence's first new position
    cu_seqlens_q: [S + 1] int64, where its new tokens begin among the batch's T
    page_table: [S, max_pages] int64, each sequence's pages in order; shorter sequences repeat their last
    """

    starts: torch.Tensor
    cu_seqlens_q: torch.Tensor
    page_table: torch.Tensor
    page_size: int
    first_key: int

    @cached_property
    def groups(self) -> tuple[QueryGroup, ...]:
        """The sequences by number of new tokens, as the torch reference takes them; made once per step."""
        firsts, starts = self.cu_seqlens_q.tolist(), self.starts.tolist()
        spans = [(start, end - first) for start, first, end in zip(starts, firsts, firsts[1:], strict=False)]
        device = self.starts.device
        return _make_query_groups(spans, self.page_table.tolist(), self.page_size, device, first_key=self.first_key)


def make_attention_layout(
    spans: Sequence[tuple[int, int]],
    page_tables: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device,
    *,
    first_key: int = 0,
) -> AttentionLayout:
    """spans: per sequence the first new position and the number of new tokens; page_tables: its pages, or more."""
    counts = [-(-(start + length) // page_size) for start, length in spans]
    max_pages = max(counts)
    table: list[int] = []
    for pages, count in zip(page_tables, counts, strict=True):
        table += pages[:count]
        table += [pages[count - 1]] * (max_pages - count)
    ends = list(accumulate((length for _, length in spans), initial=0))
    # One tensor for all: making a small one costs as much as a small kernel.
    everything = torch.tensor([*(start for start, _ in spans), *ends, *table], device=device)
    starts, cu_seqlens_q, page_table = everything.split([len(spans), len(ends), len(table)])
    return AttentionLayout(starts, cu_seqlens_q, page_table.view(len(spans), max_pages), page_size, first_key)


@dataclass(frozen=True)
class QueryGroup:
    """B sequences with n new tokens each.

    rows: slice of the batch's tokens if the B · n rows are adjacent, else [B · n] int64 row indices
    pages: [B · P] int64, each sequence's pages in order; shorter sequences repeat a page, which ``bias`` hides
    keys: the slice of P · page_size keys that anyone may attend to
    bias: [B, 1, n, len(keys)] float32, 0 where the query may attend and -inf elsewhere; None where all may
    """

    rows: slice | torch.Tensor
    num_seqs: int
    num_queries: int
    pages: torch.Tensor
    keys: slice
    bias: torch.Tensor | None


def _make_query_groups(
    spans: Sequence[tuple[int, int]],
    page_tables: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device,
    *,
    first_key: int,
) -> tuple[QueryGroup, ...]:
    """Group sequences by number of new tokens. A query at position p sees the keys first_key … p.

    spans: per sequence the first new position and the number of new tokens
    """
    by_length: dict[int, list[int]] = {}
    for i, (_, length) in enumerate(spans):
        by_length.setdefault(length, []).append(i)
    firsts = [0]
    for _, length in spans:
        firsts.append(firsts[-1] + length)
    groups = []
    for length, members in by_length.items():
        num_pages = -(-(max(spans[i][0] for i in members) + length) // page_size)
        table = []
        for i in members:
            used = list(page_tables[i][: -(-(spans[i][0] + length) // page_size)])
            table.append(used + used[-1:] * (num_pages - len(used)))
        starts = [spans[i][0] for i in members]
        keys = slice(first_key, max(starts) + length)
        rows: slice | torch.Tensor = slice(firsts[members[0]], firsts[members[-1] + 1])
        if members[-1] - members[0] + 1 != len(members):
            rows = torch.tensor([row for i in members for row in range(firsts[i], firsts[i + 1])], device=device)
        pages = torch.tensor([page for one in table for page in one], device=device)
        groups.append(QueryGroup(rows, len(members), length, pages, keys, _causal_bias(starts, length, keys, device)))
    return tuple(groups)


def _causal_bias(starts: list[int], length: int, keys: slice, device: torch.device) -> torch.Tensor | None:
    """[B, 1, n, len(keys)]: hides from the query at start + i every key beyond it."""
    if length == 1 and min(starts) + 1 == keys.stop:
        return None
    last_key = torch.tensor([list(range(start, start + length)) for start in starts], device=device)
    hidden = torch.arange(keys.start, keys.stop, device=device) > last_key[:, :, None]
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Grouped-query attention (Ainslie et al., 2023) of new tokens over paged keys and values.

    q: [T, num_heads, head_dim]; rows may be further apart than they are long
    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], the new tokens' entries written already
    Returns [T, num_heads, head_dim] in q's dtype; softmax in float32.
    """
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
    if len(groups) == 1 and isinstance(groups[0].rows, slice):
        return _attend(q, k_cache, v_cache, groups[0], scale)
    out = q.new_empty(q.shape)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], k_cache, v_cache, group, scale)
    return out


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: QueryGroup, scale: float
) -> torch.Tensor:
    b, n = group.num_seqs, group.num_queries
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = k_cache.shape[2]
    num_folded = num_heads // num_kv_heads
    shape = (b, -1, num_kv_heads, head_dim)
    keys = k_cache.index_select(0, group.pages).view(shape)[:, group.keys].transpose(1, 2)
    values = v_cache.index_select(0, group.pages).view(shape)[:, group.keys].transpose(1, 2)
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
