"""Rank 0 of several: it says what is computed next, and the others compute the same.

Sampling and acceptance happen here alone. What is drafted goes to the others by a broadcast between two draft steps,
what is accepted with the next step.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import msgspec

from nextn.distributed.parallel import TensorParallel
from nextn.protocol.ranks import DecodeBatch, ExtendPart, Finish, ScorePart, StepPart, StillHere, ToRanks
from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence, Status
from nextn.speculative.logprobs import prompt_rows


@dataclass
class _Told:
    """What the followers know of a sequence."""

    seq: Sequence
    num_tokens: int
    pages: list[int]


class Leader:
    """Tells the followers of each forward pass before it begins. Alone, it tells nobody."""

    def __init__(self, tp: TensorParallel) -> None:
        self._tp = tp
        self._encoder = msgspec.msgpack.Encoder()
        self._told: dict[int, _Told] = {}

    def step(self, extends: list[Extend]) -> None:
        """The cycle's next step."""
        if self._tp.size == 1:
            return
        gone = [seq_id for seq_id, told in self._told.items() if told.seq.status is Status.FINISHED]
        for seq_id in gone:
            del self._told[seq_id]
        self._send(StepPart([self._part(extend) for extend in extends], gone))

    def decode(self, batch: DecodeBatch) -> None:
        """A decode step on the device."""
        if self._tp.size > 1:
            self._send(batch)

    def score(self, start: int, tokens: Items[int], pages: Items[int], first_row: int) -> None:
        """A forward of the target alone, outside of the cycle."""
        if self._tp.size > 1:
            self._send(ScorePart(start, list(tokens), list(pages), first_row))

    def still_here(self) -> None:
        self._send(StillHere())

    def finish(self) -> None:
        self._send(Finish())

    def _send(self, message: ToRanks) -> None:
        self._tp.send(self._encoder.encode(message))

    def _part(self, extend: Extend) -> ExtendPart:
        seq = extend.seq
        told = self._told.setdefault(seq.arrival, _Told(seq, 0, []))
        num_kept = _num_common(told.pages, seq.pages)
        rows = prompt_rows(extend)
        part = ExtendPart(
            seq.arrival,
            extend.start,
            extend.num_tokens,
            extend.num_drafts,
            extend.decides,
            extend.wants_drafts,
            seq.num_draft_computed,
            seq.tokens[told.num_tokens :],
            num_kept,
            seq.pages[num_kept:],
            (rows.start, rows.stop) if rows else None,
        )
        told.num_tokens, told.pages = len(seq.tokens), list(seq.pages)
        return part


def _num_common(before: list[int], now: list[int]) -> int:
    """Length of the common beginning. Mostly one is the beginning of the other."""
    length = min(len(before), len(now))
    if before[:length] == now[:length]:
        return length
    return next(i for i in range(length) if before[i] != now[i])
