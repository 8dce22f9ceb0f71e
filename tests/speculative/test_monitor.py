"""The acceptance monitor: each change of the draft's health is said once, and nothing else is."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable

import pytest
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.scheduler import Decision, Extend
from nextn.scheduler.sequence import Sequence
from nextn.speculative.monitor import (
    ALARM_GENERATIONS,
    GENERATION,
    NEVER_HEALTHY_AFTER,
    REPORT_GENERATIONS,
    AcceptanceMonitor,
)

MAX_DRAFTS = 5
ALARM_WINDOW = ALARM_GENERATIONS * GENERATION


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sequence(prompt_len: int = 10, *, cached: int = 0, is_chunked: bool = False) -> Sequence:
    sampling = TokenSampling(max_new_tokens=1, seed=0)
    request = AddRequest(rid="r", input_ids=[1] * prompt_len, sampling=sampling)
    seq = Sequence(request=request, arrival=0, arrival_time=0.0, max_new_tokens=1, stop_ids=frozenset())
    seq.cached_tokens, seq.is_chunked = cached, is_chunked
    return seq


def feed(
    monitor: AcceptanceMonitor, outcomes: Iterable[tuple[int, int]], seq: Sequence | None = None, *, num_alike: int = 1
) -> None:
    """outcomes: (drafted, accepted) of each step's chains, of which there are ``num_alike``"""
    for drafted, accepted in outcomes:
        extend = Extend(seq or sequence(), 0, 1, drafted, decides=True, wants_drafts=True)
        for _ in range(num_alike):
            monitor.count(extend, Decision([], accepted))
        monitor.end_step()


def chains(num: int, rate: float, num_drafts: int = 3, seed: int = 0) -> list[tuple[int, int]]:
    """Chains each of whose drafts is accepted with probability ``rate`` if those before it were."""
    rng = random.Random(seed)
    found = []
    for _ in range(num):
        accepted = 0
        while accepted < num_drafts and rng.random() < rate:
            accepted += 1
        found.append((num_drafts, accepted))
    return found


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_collapse_and_the_recovery_are_each_said_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    feed(monitor, chains(2000, 0.8))
    assert (monitor.state, monitor.complaint, errors(caplog)) == ("healthy", None, [])
    feed(monitor, chains(5000, 0.02))
    (line,) = errors(caplog)
    assert "draft collapsed: the first draft was accepted in" in line
    usual = int(line.partition(" drafted chains, in ")[2].partition("%")[0])
    assert usual == pytest.approx(80, abs=4)
    assert monitor.state == "collapsed"
    assert monitor.complaint is not None
    assert monitor.complaint in line
    assert monitor.num_collapses == 1
    feed(monitor, chains(5000, 0.8))
    assert len(errors(caplog)) == 2
    assert "draft recovered" in errors(caplog)[1]
    assert (monitor.state, monitor.complaint, monitor.num_collapses) == ("healthy", None, 1)
    feed(monitor, chains(5000, 0.0))
    assert (len(errors(caplog)), monitor.num_collapses) == (3, 2)


def test_a_collapse_is_seen_within_one_window_of_drafted_chains(caplog: pytest.LogCaptureFixture) -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    feed(monitor, chains(2000, 0.7))
    feed(monitor, chains(ALARM_WINDOW, 0.02, num_drafts=1))  # as the policy probes when drafts no longer pay
    assert monitor.state == "collapsed"


@pytest.mark.parametrize("num_alike", [16, 64, 256])
def test_many_clients_that_ask_the_same_are_no_collapse(num_alike: int, caplog: pytest.LogCaptureFixture) -> None:
    """Their chains rise and fall together, so that a few hundred of them are a handful of observations."""
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    feed(monitor, chains(4000, 0.6), num_alike=num_alike)
    assert (monitor.state, errors(caplog)) == ("healthy", [])
    feed(monitor, chains(200, 0.02), num_alike=num_alike)
    assert monitor.state == "collapsed"


def test_harder_text_is_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    for seed, rate in enumerate((0.85, 0.5, 0.75, 0.4, 0.9, 0.35)):
        feed(monitor, chains(3000, rate, seed=seed))
    assert (monitor.state, errors(caplog)) == ("healthy", [])


def test_a_draft_that_never_worked_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    feed(monitor, chains(NEVER_HEALTHY_AFTER - 1, 0.1))
    assert (monitor.state, errors(caplog)) == ("unknown", [])
    feed(monitor, chains(5000, 0.1))
    assert monitor.state == "never_healthy"
    (line,) = errors(caplog)
    assert "draft never healthy" in line
    feed(monitor, chains(1000, 0.8))
    assert (monitor.state, monitor.complaint) == ("healthy", None)


def test_hard_text_from_the_start_is_no_alarm_for_a_head_that_has_proven_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS, is_proven=True)
    feed(monitor, chains(5000, 0.1))
    assert (monitor.state, errors(caplog)) == ("unknown", [])


def test_random_weights_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS, is_trained=False)
    feed(monitor, chains(5000, 0.0))
    assert (monitor.state, errors(caplog)) == ("unknown", [])
    assert monitor.windows()["all"].accept_length == 1.0


def test_windows_tell_kinds_of_traffic_apart() -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    feed(monitor, [(3, 3)] * 10, sequence(100))
    feed(monitor, [(3, 0)] * 10, sequence(129, cached=64))
    feed(monitor, [(2, 1)] * 10, sequence(9000, is_chunked=True))
    windows = monitor.windows()
    assert windows["all"].num_chains == 30
    assert windows["all"].drafted_per_position == [30, 30, 20, 0, 0]
    assert windows["all"].accepted_per_position == [20, 10, 10, 0, 0]
    assert windows["all"].accept_length == 1 + 40 / 30
    assert windows["prompt_len<=128"].rates == [1.0, 1.0, 1.0]
    assert windows["prompt_len<=1024"].rates == windows["cached"].rates == [0.0, 0.0, 0.0]
    assert windows["prompt_len>8192"].rates == windows["chunked"].rates == [1.0, 0.0]
    assert windows["not_chunked"].num_chains == windows["not_cached"].num_chains == 20
    assert "prompt_len<=8192" not in windows


def test_a_window_forgets_what_is_older() -> None:
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    feed(monitor, [(3, 3)] * 100, sequence(2000))
    feed(monitor, [(1, 1)] * GENERATION * (REPORT_GENERATIONS + 4))
    window = monitor.windows()["all"]
    assert window.drafted_per_position == window.accepted_per_position
    assert window.drafted_per_position[1:] == [0] * 4
    assert 0 <= window.num_chains - GENERATION * REPORT_GENERATIONS < GENERATION
    assert "prompt_len<=8192" not in monitor.windows()


def test_the_log_and_the_server_hear_of_it_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    monitor = AcceptanceMonitor(MAX_DRAFTS, clock=clock)
    feed(monitor, chains(1000, 0.8))
    revision = monitor.revision
    assert not caplog.records
    for _ in range(12):
        clock.now += 10
        feed(monitor, chains(1000, 0.8))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("draft: accept length ")
    assert monitor.revision == revision + 12


def test_counting_is_cheap() -> None:
    """0.5 µs a chain on the machine it was written on; the budget is 2 µs, and CI machines are slow and shared."""
    monitor = AcceptanceMonitor(MAX_DRAFTS)
    seq = sequence()
    steps = [(Extend(seq, 0, 1, d, decides=True, wants_drafts=True), Decision([], a)) for d, a in chains(2000, 0.7)]
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        for extend, decision in steps:
            monitor.count(extend, decision)
        best = min(best, (time.perf_counter() - started) / len(steps))
    assert best < 4e-6
