"""The target's hidden states that entries of the draft layer are still to be made of."""

from __future__ import annotations

import torch

from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence

RING = 64
"""Positions kept per sequence: more than the entries that may be missing, and the drafts of a step, together."""


class HiddenStates:
    """One home for each position: the row of its page if it is the page's last, else a row of its sequence's ring.

    So whoever takes a page from the prefix cache finds the state before the first token that it computes itself, and a
    running sequence its latest ones; all others are used up in the step that computes them.

    states: [num_pages + max_running · RING, H]
    """

    def __init__(self, num_pages: int, page_size: int, max_running: int, like: torch.Tensor) -> None:
        """like: [H], of the states' dtype and device"""
        self._num_pages = num_pages
        self._page_size = page_size
        self._states = like.new_zeros(num_pages + max_running * RING, like.shape[0])

    def homes(self, seq: Sequence, positions: range) -> list[int]:
        """Row of each position's state."""
        return [self._home(seq, position) for position in positions]

    def _home(self, seq: Sequence, position: int) -> int:
        page, offset = divmod(position, self._page_size)
        if offset == self._page_size - 1:
            return seq.pages[page]
        return self._num_pages + seq.slot * RING + position % RING

    def store(self, extends: list[Extend], hidden: torch.Tensor) -> None:
        """Keep what a later step may ask for. hidden: [T, H], num_tokens + num_drafts rows per extend."""
        if len(hidden) == len(extends):
            homes = [self._home(extend.seq, extend.start) for extend in extends]
            self._states.index_copy_(0, self._indices(homes), hidden)
            return
        rows: list[int] = []
        homes = []
        row = 0
        for extend in extends:
            num_rows = extend.num_tokens + extend.num_drafts
            first, end = extend.start, extend.start + num_rows
            recent = range(max(first, end - RING), end)
            page_ends = range(first + self._page_size - 1 - first % self._page_size, recent.start, self._page_size)
            for kept in (page_ends, recent):
                rows += range(row + kept.start - first, row + kept.stop - first, kept.step)
                homes += self.homes(extend.seq, kept)
            row += num_rows
        source = hidden if len(rows) == row else hidden.index_select(0, self._indices(rows))
        self._states.index_copy_(0, self._indices(homes), source)

    def load(self, homes: list[int]) -> torch.Tensor:
        """States by row, [len(homes), H]."""
        return self._states.index_select(0, self._indices(homes))

    def _indices(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._states.device)
