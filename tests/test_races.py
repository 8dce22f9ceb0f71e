"""The watch that looks for races in the kernels' tests finds them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.races import RaceWatch


def _places(*places: int) -> np.ndarray:
    return np.array(places, dtype=np.uint64)


def test_a_program_may_read_what_another_wrote_only_behind_a_counter() -> None:
    watch = RaceWatch()
    for is_guarded in (True, False):
        watch.begin_program()
        watch.write(_places(8, 16), _places(1, 2))
        watch.count(_places(32))
        watch.begin_program()
        watch.read(_places(16), is_guarded=is_guarded)
        if is_guarded:
            watch.end_launch("kernel")
    with pytest.raises(AssertionError, match="reads what another one writes"):
        watch.end_launch("kernel")


def test_programs_write_nothing_but_equal_values_to_a_place() -> None:
    watch = RaceWatch()
    for value in (1, 2):
        for _ in range(2):
            watch.begin_program()
            watch.write(_places(8), _places(value))
        if value == 1:
            watch.end_launch("kernel")
        else:
            watch.begin_program()
            watch.write(_places(8), _places(3))
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
