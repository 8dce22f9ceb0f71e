"""The watch that looks for races in the kernels' tests finds them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.races import RaceWatch


def _places(*places: int) -> np.ndarray:
    return np.array(places, dtype=np.uint64)


COUNTER, OTHER_COUNTER = _places(32), _places(40)


def _written(watch: RaceWatch) -> None:
    """A program stores, passes a barrier and counts."""
    watch.begin_program()
    watch.write(_places(8, 16), _places(1, 2))
    watch.pass_barrier()
    watch.count(COUNTER)


def test_a_program_may_read_what_another_wrote_only_past_the_l1_cache() -> None:
    for is_guarded in (True, False):
        watch = RaceWatch()
        _written(watch)
        watch.begin_program()
        watch.count(COUNTER)
        watch.read(_places(16), is_guarded=is_guarded)
        if is_guarded:
            watch.end_launch("kernel")
    with pytest.raises(AssertionError, match="reads what another one writes"):
        watch.end_launch("kernel")


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("count", "store", "barrier"), id="it counts before it stores"),
        pytest.param(("store", "count", "barrier"), id="its barrier comes after its count"),
        pytest.param(("barrier", "store", "count"), id="its barrier comes before its store"),
        pytest.param(("store", "barrier", "count", "store"), id="it stores again afterwards"),
        pytest.param(("store", "barrier", "count relaxed"), id="its count releases nothing"),
    ],
)
def test_a_writer_counts_behind_a_barrier_behind_its_store(steps: tuple[str, ...]) -> None:
    watch = RaceWatch()
    watch.begin_program()
    for step in steps:
        if step == "store":
            watch.write(_places(8), _places(1))
        elif step == "barrier":
            watch.pass_barrier()
        else:
            watch.count(COUNTER, is_ordering=step == "count")
    watch.begin_program()
    watch.count(COUNTER)
    watch.read(_places(8), is_guarded=True)
    with pytest.raises(AssertionError, match="reads what another one writes"):
        watch.end_launch("kernel")


@pytest.mark.parametrize("counters", [(), (OTHER_COUNTER,)], ids=["not at all", "elsewhere"])
def test_a_reader_counts_where_the_writer_did(counters: tuple[np.ndarray, ...]) -> None:
    watch = RaceWatch()
    _written(watch)
    watch.begin_program()
    for counter in counters:
        watch.count(counter)
    watch.read(_places(16), is_guarded=True)
    watch.count(COUNTER)  # too late
    with pytest.raises(AssertionError, match="reads what another one writes"):
        watch.end_launch("kernel")


def test_a_reader_counts_after_the_writer() -> None:
    watch = RaceWatch()
    watch.begin_program()
    watch.count(COUNTER)
    watch.read(_places(16), is_guarded=True)
    _written(watch)
    with pytest.raises(AssertionError, match="reads what another one writes"):
        watch.end_launch("kernel")


def test_programs_write_nothing_but_equal_values_to_a_place() -> None:
    for last in (1, 2):
        watch = RaceWatch()
        for value in (1, 1, last):
            watch.begin_program()
            watch.write(_places(8), _places(value))
        if last == 1:
            watch.end_launch("kernel")
    with pytest.raises(AssertionError, match="write to a place"):
        watch.end_launch("kernel")


def test_a_place_is_touched_by_other_threads_only_behind_a_barrier() -> None:
    watch = RaceWatch()
    watch.begin_program()
    watch.write(_places(8, 16), _places(1, 1))
    watch.read(_places(8, 16), is_guarded=False)  # each thread its own
    watch.pass_barrier()
    watch.read(_places(16), is_guarded=False)
    with pytest.raises(AssertionError, match="without a barrier"):
        watch.write(_places(16, 8), _places(1, 1))
