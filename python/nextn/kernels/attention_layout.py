"""Which new tokens belong to which sequence, and where a sequence's keys and values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from nextn.kernels.gpu import upload


@dataclass(frozen=True)
class AttentionLayout:
    """Where S sequences' new tokens and all their keys are. A query at position p sees the keys first_key … p.

    starts: [S] int64, each sequence's first new position
    cu_seqlens_q: [S + 1] int64, where its new tokens begin among the batch's T; a sequence may have none
    page_table: [S, max_pages] int64, each sequence's pages in order; shorter sequences repeat their last
    page_size: a power of two
    max_query_len: at least the number of new tokens of every sequence
    """

    starts: torch.Tensor
    cu_seqlens_q: torch.Tensor
    page_table: torch.Tensor
    page_size: int
    first_key: int
    max_query_len: int

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
        table += [pages[count - 1] if count else 0] * (max_pages - count)
    ends = list(accumulate((length for _, length in spans), initial=0))
    # One tensor for all: making a small one costs as much as a small kernel.
    everything = upload([*(start for start, _ in spans), *ends, *table], device=device)
    starts, cu_seqlens_q, page_table = everything.split([len(spans), len(ends), len(table)])
    return AttentionLayout(
        starts,
        cu_seqlens_q,
        page_table.view(len(spans), max_pages),
        page_size,
        first_key,
        max(length for _, length in spans),
    )


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
        if length > 0:
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
        keys = slice(first_key, max(max(starts) + length, first_key))
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
