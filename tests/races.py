"""Races that Triton's interpreter hides, which runs a launch's programs, and a program's threads, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

PADDED = {"_commit_sequences", "_rope_and_cache"}
"""Kernels that let all padding write to one place, which nobody reads."""


@dataclass
class _Program:
    """What a program has done so far.

    written: places, by store; num_ordered: stores that have a barrier behind them
    read: places, by load since the last barrier
    counts: by count, its places and num_ordered at the time
    found: places that others had written, as its counts tell it
    """

    written: list[Any] = field(default_factory=list)
    num_ordered: int = 0
    read: list[Any] = field(default_factory=list)
    counts: list[tuple[Any, int]] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)


class RaceWatch:
    """The places that one launch's programs read and write, by address.

    No program may read what another one writes, unless past the L1 cache and in an order that a counter makes: the
    writer stores, passes a barrier and counts; the reader counts at the same place later, and then reads. Nor may two
    write different values to a place. Within a program, elements of tiles belong to threads: a place that is touched
    again at another element needs a barrier in between.
    """

    def __init__(self) -> None:
        self._reads: list[tuple[Any, Any]] = []
        self._writes: list[tuple[Any, Any, Any]] = []
        self._counters: list[Any] = []
        self._published: dict[int, list[Any]] = {}  # by counter: places that are written for whoever counts there
        self._num_programs = 0
        self._program = _Program()

    def begin_program(self) -> None:
        """The program before has ended."""
        for counters, num_ordered in self._program.counts:
            if num_ordered:
                places = np.concatenate(self._program.written[:num_ordered])
                if later := self._program.written[num_ordered:]:
                    places = places[~np.isin(places, np.concatenate(later))]
                for counter in counters.tolist():
                    self._published.setdefault(counter, []).append(places)
        self._num_programs += 1
        self._program = _Program()

    def pass_barrier(self) -> None:
        self._program.num_ordered = len(self._program.written)
        self._program.read.clear()

    def read(self, places: Any, *, is_guarded: bool) -> None:
        program = self._program
        _check_apart(places, program.written[program.num_ordered :])
        program.read.append(places)
        if is_guarded and program.found:
            places = places[~np.isin(places, np.concatenate(program.found))]
        self._reads.append((places, np.full(places.size, self._num_programs)))

    def write(self, places: Any, values: Any) -> None:
        program = self._program
        _check_apart(places, program.written[program.num_ordered :])
        _check_apart(places, program.read)
        program.written.append(places)
        self._writes.append((places, np.full(places.size, self._num_programs), values))

    def count(self, places: Any, *, is_ordering: bool = True) -> None:
        """is_ordering: it releases what has a barrier behind it, and acquires what others released; not relaxed."""
        self._counters.append(places)
        if is_ordering:
            self._program.counts.append((places, self._program.num_ordered))
            for counter in places.tolist():
                self._program.found += self._published.get(counter, [])

    def end_launch(self, name: str) -> None:
        """Raises AssertionError if its programs disturb each other."""
        reads, writes, counters = self._reads, self._writes, self._counters
        if not writes:
            return
        places, programs, values = (np.concatenate(parts) for parts in zip(*writes, strict=True))
        is_plain = ~np.isin(places, np.concatenate(counters)) if counters else np.full(places.size, True)
        places, programs, values = (part[is_plain] for part in (places, programs, values))
        order = np.argsort(places, kind="stable")
        places, programs, values = places[order], programs[order], values[order]
        is_same = (places[1:] == places[:-1]) & (programs[1:] != programs[:-1])
        assert name in PADDED or not (is_same & (values[1:] != values[:-1])).any(), f"{name}: programs write to a place"
        if reads and places.size:
            read_places, read_programs = (np.concatenate(parts) for parts in zip(*reads, strict=True))
            at = np.minimum(np.searchsorted(places, read_places), places.size - 1)
            is_others = (places[at] == read_places) & (programs[at] != read_programs)
            assert not is_others.any(), f"{name}: a program reads what another one writes"


def _check_apart(places: Any, earlier: list[Any]) -> None:
    """Raises AssertionError if threads could touch places that others have touched."""
    for others in earlier:
        if places.min() > others.max() or places.max() < others.min() or np.array_equal(places, others):
            continue
        assert not np.isin(places, others).any(), "a place is touched by two threads without a barrier in between"


def watch_for_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, launches in the interpreter raise AssertionError where a GPU could go wrong."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    watch = RaceWatch()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    count, barrier = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_barrier
    begin, launch = InterpreterBuilder.set_grid_idx, GridExecutor.__call__

    def watched_load(self: Any, pointers: Any, mask: Any, other: Any, *how: Any, **more: Any) -> Any:
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if places.size:
            watch.read(places, is_guarded="cg" in f"{how} {more}".lower())
        return load(self, pointers, mask, other, *how, **more)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any, **more: Any) -> Any:
        is_stored = np.broadcast_to(mask.data, pointers.data.shape)
        places = pointers.data[is_stored]
        if places.size:
            values = np.ascontiguousarray(np.broadcast_to(value.data, pointers.data.shape)[is_stored])
            watch.write(places, values.view(f"u{values.itemsize}").astype(np.uint64))
        return store(self, pointers, value, mask, *how, **more)

    def watched_count(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        watch.count(places, is_ordering="ACQUIRE_RELEASE" in str(order) and "CTA" not in str(scope))
        return count(self, operation, pointers, value, mask, order, scope)

    def watched_barrier(self: Any) -> Any:
        watch.pass_barrier()
        return barrier(self)

    def watched_begin(self: Any, x: int, y: int, z: int) -> None:
        watch.begin_program()
        begin(self, x, y, z)

    def watched_launch(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal watch
        watch = RaceWatch()
        launch(self, *arguments, **options)
        watch.end_launch(self.fn.__name__)

    for name, function in (
        ("create_masked_load", watched_load),
        ("create_masked_store", watched_store),
        ("create_atomic_rmw", watched_count),
        ("create_barrier", watched_barrier),
        ("set_grid_idx", watched_begin),
        ("get_cache_policy", lambda self, modifier, eviction: modifier),
    ):
        monkeypatch.setattr(InterpreterBuilder, name, function, raising=False)
    monkeypatch.setattr(GridExecutor, "__call__", watched_launch)
