"""The target's hidden states that entries of the draft layer are still to be made of."""

from __future__ import annotations

import torch

from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence

RING = 64
"""Positions kept per sequence: more than the entries that may be missing, and the drafts of a step, together."""

MAX_UNWRITTEN = 16
"""Steps whose states are copied to their homes in one go."""


class HiddenStates:
    """One home for each position: the row of its page if it is the page's last, else a row of its sequence's ring.

    So whoever takes a page from the prefix cache finds the state before the first token that it computes itself, and a
    running sequence its latest ones; all others are used up in the step that computes them.

    states: [num_pages + max_running · RING, H]
    unwritten: hidden states of the latest steps that still have to be copied there
    row_of_home: which of their rows goes where
    """

    def __init__(self, num_pages: int, page_size: int, max_running: int, like: torch.Tensor) -> None:
        """like: [H], of the states' dtype and device"""
        self._num_pages = num_pages
        self._page_size = page_size
        self._states = like.new_zeros(num_pages + max_running * RING, like.shape[0])
        self._unwritten: list[torch.Tensor] = []
        self._row_of_home: dict[int, int] = {}

    def homes(self, seq: Sequence, positions: range) -> list[int]:
        """Row of each position's state."""
        size, pages = self._page_size, seq.pages
        ring = self._num_pages + seq.slot * RING
        return [pages[p // size] if p % size == size - 1 else ring + p % RING for p in positions]

    def _home(self, seq: Sequence, position: int) -> int:
        size = self._page_size
        if position % size == size - 1:
            return seq.pages[position // size]
        return self._num_pages + seq.slot * RING + position % RING

    def store(self, extends: list[Extend], hidden: torch.Tensor) -> None:
        """Keep what a later step may ask for. hidden: [T, H], num_tokens + num_drafts rows per extend."""
        if len(hidden) > len(extends):
            self._flush()
            homes, rows = self._kept_rows(extends)
            source = hidden if len(rows) == len(hidden) else hidden.index_select(0, self._indices(rows))
            self._states.index_copy_(0, self._indices(homes), source)
            return
        # One token each: while nothing is drafted nobody asks, so several steps are copied in one go.
        first_row = sum(map(len, self._unwritten))
        for row, extend in enumerate(extends, first_row):
            self._row_of_home[self._home(extend.seq, extend.start)] = row
        self._unwritten.append(hidden)
        if len(self._unwritten) >= MAX_UNWRITTEN:
            self._flush()

    def load(self, homes: list[int]) -> torch.Tensor:
        """States by row, [len(homes), H]."""
        self._flush()
        return self._states.index_select(0, self._indices(homes))

    def _flush(self) -> None:
        if self._unwritten:
            homes, rows = self._indices(list(self._row_of_home)), self._indices(list(self._row_of_home.values()))
            self._states.index_copy_(0, homes, torch.cat(self._unwritten).index_select(0, rows))
            self._unwritten.clear()
            self._row_of_home.clear()

    def _kept_rows(self, extends: list[Extend]) -> tuple[list[int], list[int]]:
        """Homes and rows of each extend's last known token and drafts, and of all page ends before.

        The entries that need the other states of a chunk are made along with it.
        """
        size = self._page_size
        homes: list[int] = []
        rows: list[int] = []
        row = 0
        for extend in extends:
            move = row - extend.start
            last, end = extend.end - 1, extend.end + extend.num_drafts
            page_ends = range(extend.start + size - 1 - extend.start % size, last, size)
            homes += self.homes(extend.seq, page_ends)
            homes += self.homes(extend.seq, range(last, end))
            rows += range(page_ends.start + move, last + move, size)
            rows += range(last + move, end + move)
            row = end + move
        return homes, rows

    def _indices(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._states.device)
