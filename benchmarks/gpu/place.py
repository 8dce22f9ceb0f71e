"""Where a section measures, how long it may, and how a kernel is timed there."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.gpu.row import Failure, Machine, Outcome, Row

WINDOW = 0.02
"""Seconds that a repeat takes at least: many times what starting it costs."""
REPEATS = 5
GRAPH = 1e-3
"""Seconds that a graph takes at least, so that what starting it costs hides neither side's gain."""
MAX_CALLS = 1024
"""Of a graph."""
MAX_COPIES = 64


class OutOfTimeError(Exception):
    """A section's time is up before all of it was measured."""


Way = Literal["gpu", "triton", "torch"]


@dataclass(frozen=True)
class Place:
    """The GPU; or, in a rehearsal, the CPU, with Triton's interpreter or the kernels' torch references.

    deadline: of the section, as time.monotonic
    machine: its limits; None until they are measured
    """

    way: Way
    deadline: float
    machine: Machine | None = None

    @property
    def is_rehearsal(self) -> bool:
        return self.way != "gpu"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_rehearsal else "cuda")

    def on_device(self) -> AbstractContextManager[None]:
        """The nextn functions called in this context are those of a GPU."""
        if self.way != "triton":
            return nullcontext()
        return _interpreter()

    def check_time(self, seconds: float, done: str) -> None:
        """Raises OutOfTimeError if so many seconds are no longer left. done: what was measured so far."""
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTimeError(f"out of time after {done}")

    @property
    def copy_bandwidth(self) -> float:
        """Bytes read and written per second. Raises RuntimeError if it was not measured."""
        if self.machine is None or self.machine.copy_bandwidth is None:
            raise RuntimeError("the copy bandwidth was not measured: see the section machine")
        return self.machine.copy_bandwidth

    @property
    def fp8_flops(self) -> float:
        """Of a large dense product. Raises RuntimeError if it was not measured."""
        if self.machine is None or self.machine.fp8_flops is None:
            raise RuntimeError("the FP8 peak was not measured: see the section machine")
        return self.machine.fp8_flops

    def copies_for(self, num_bytes: int) -> int:
        """So many copies of a tensor that none is still in the L2 cache when its turn comes again."""
        if self.is_rehearsal:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size or 64 << 20
        return min(max(-(-3 * cache // num_bytes), 2), MAX_COPIES)

    def seconds_per_call(
        self, calls: Sequence[Callable[[], object]], *, window: float = WINDOW, num_repeats: int = REPEATS
    ) -> float:
        """Median time of one of the calls, which run in turn, again and again, as one recorded graph.

        window: seconds that a repeat takes at least
        """
        return self.seconds_side_by_side([calls], window=window, num_repeats=num_repeats)[0]

    def seconds_side_by_side(
        self, sides: Sequence[Sequence[Callable[[], object]]], *, window: float = WINDOW, num_repeats: int = REPEATS
    ) -> list[float]:
        """``seconds_per_call`` of each side, whose repeats take turns: the card's clock is the same for all."""
        if self.is_rehearsal:
            return [_seconds_in_turn(calls) for calls in sides]
        graphs = [_long_graph(calls) for calls in sides]
        repeats = [max(round(window / max(replayed(graph, 1), 1e-6)), 1) for graph, _ in graphs]
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(num_repeats):
            for (graph, num_calls), times, of_side in zip(graphs, repeats, found, strict=True):
                of_side.append(replayed(graph, times) / num_calls)
        return [statistics.median(of_side) for of_side in found]


@contextmanager
def _interpreter() -> Iterator[None]:
    import pytest

    from tests.interpreter import stand_in_for_a_gpu

    with pytest.MonkeyPatch.context() as patches:
        stand_in_for_a_gpu(patches)
        yield


def _seconds_in_turn(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) / len(calls)


def _long_graph(calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that takes GRAPH seconds, and how many calls it holds."""
    graph = _recorded(calls)
    times = min(math.ceil(GRAPH / max(replayed(graph, 1), 1e-6)), max(MAX_CALLS // len(calls), 1))
    return (graph, len(calls)) if times == 1 else (_recorded([*calls] * times), times * len(calls))


def _recorded(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles kernels, and lets libraries make what cannot be made while recording
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Seconds per replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def attempt(what: str, run: Callable[[], Row]) -> Outcome:
    """One figure that cannot be measured does not stop those after it."""
    try:
        return run()
    except Exception as error:
        return Failure(what, f"{type(error).__name__}: {error}", traceback.format_exc())


def those_that_run(ways: Sequence[Callable[..., object]], *arguments: object) -> list[Callable[..., object]]:
    """Without those that the card, or the version of a library, does not have. Raises RuntimeError if none is left."""
    found, errors = [], []
    for way in ways:
        try:
            way(*arguments)
            found.append(way)
        except RuntimeError as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an element nobody wrote shows."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public function imports torch's compiler first
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def check(got: torch.Tensor, exact: torch.Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError if an element is further off than ``tolerance`` times the root mean square of all.

    got: what a kernel made; exact: the same in float64
    """
    assert bool(got.isfinite().all()), f"{what}: there are elements that are not finite, or not written"
    scale = float(exact.square().mean().sqrt())
    worst = float((got.double() - exact).abs().max()) / max(scale, 1e-30)
    assert worst <= tolerance, (
        f"{what}: an element is off by {worst:.3g} of their root mean square; allowed {tolerance:g}"
    )
