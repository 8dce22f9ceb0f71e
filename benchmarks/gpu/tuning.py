"""Whether other tile sizes, splits, stages, warps or prefetches would be faster on this card than what nextn chooses.

Every case is swept over the neighbourhood of its choice. The fastest ways are timed again, beside the chosen one, and
held to a float64 reference. Cases come in the order of their weight; what is not reached in time is said.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels import gpu
from nextn.kernels.fp8_quantize import FP8

from benchmarks.gpu.candidates import Case, Knobs, Work, candidates, using
from benchmarks.gpu.matmul import linears
from benchmarks.gpu.place import OutOfTimeError, Place, attempt, poisoned
from benchmarks.gpu.row import Goal, Machine, Outcome, Row
from benchmarks.gpu.shapes import config_of
from benchmarks.gpu.tuned_layers import Attention, Layers, Router
from benchmarks.gpu.tuned_products import Expert, Product
from tests.card import Card

GOAL = Goal(at_most=1.05)
WINDOW, NUM_REPEATS = 0.004, 3
"""Of the sweep. What is nearly as fast as the fastest is timed with more care."""
NUM_FINALISTS, NUM_FINALS = 3, 3
CANDIDATE_SECONDS, CASE_SECONDS = 0.06, 1.5
COMPILE_SECONDS = 30
"""About what the kernels of a round take on 16 cores."""
NUM_REHEARSED = 3
RANKS = 8
META = torch.device("meta")
HOPPER = 90
"""What a rehearsal compiles for."""

Key = tuple[str, tuple[tuple[str, int], ...]]
"""A case and its knobs."""


@dataclass(frozen=True)
class Swept:
    """A case's candidates, the chosen one first, with the seconds of those that ran and were not found wrong."""

    case: Case
    seconds: list[tuple[Knobs, float]]
    ratio: float


def measure(place: Place) -> Iterator[Outcome]:
    machine = place.machine
    if machine is None:
        raise RuntimeError("the card's limits were not measured: see the section machine")
    swept: list[Swept] = []
    late: OutOfTimeError | None = None
    with place.on_device(), torch.inference_mode():
        try:
            yield from _sweep(place, machine, swept)
        except OutOfTimeError as error:
            late = error
    families = dict.fromkeys(one.case.family for one in swept)
    for family in families:
        yield _summary(family, [one for one in swept if one.case.family == family])
    if late is not None:
        raise late


def _sweep(place: Place, machine: Machine, swept: list[Swept]) -> Iterator[Outcome]:
    every = rounds(place)
    order = [case for cases in every for case in cases]
    for cases in every:
        _check_time(place, COMPILE_SECONDS, order, cases[0])
        started = time.monotonic()
        tried = {
            case.what: candidates(case, machine)[: NUM_REHEARSED if place.is_rehearsal else None] for case in cases
        }
        num_kernels, unusable = compile_all(place, machine, cases, tried)
        taken = time.monotonic() - started
        yield Row(
            f"candidates of {cases[0].what} … {cases[-1].what} that cannot run",
            Goal(),
            len(unusable),
            f"of {sum(map(len, tried.values()))}",
            len(unusable),
            note=f"{num_kernels} kernels compiled in {taken:.0f} s on {os.cpu_count()} cores",
        )
        for case in cases:
            _check_time(place, CASE_SECONDS + CANDIDATE_SECONDS * len(tried[case.what]), order, case)
            yield attempt(case.what, partial(_row, place, machine, case, tried[case.what], unusable, swept))
            if not place.is_rehearsal:
                torch.cuda.synchronize()  # an error that outlives its launch ends the section
                torch.cuda.empty_cache()


def _check_time(place: Place, seconds: float, order: list[Case], case: Case) -> None:
    if not place.is_rehearsal:
        i = order.index(case)
        rest = ", ".join(dict.fromkeys(one.family for one in order[i:]))
        place.check_time(seconds, f"{i} of {len(order)} cases; not reached: {case.what}, and others of {rest}")


def rounds(place: Place) -> list[list[Case]]:
    """All cases, the weightiest first. Those of a round are compiled together."""
    air, large = config_of("glm-4.5-air", place), config_of("glm-4.6", place)
    can_start_early = not place.is_rehearsal and gpu.starts_early(place.device)
    layers = config_of("glm-4.5-air", place, 4 if not place.is_rehearsal else 3)
    if place.is_rehearsal:
        return [
            [
                Product("qkv", 3, *linears(air)["qkv"]),
                Expert("rehearsal", air, 3, air.moe_intermediate_size, swiglu=True),
                Expert("rehearsal", air, 3, air.moe_intermediate_size, swiglu=False),
                Attention(air, 2, 64, FP8),
                Router(air, 3),
                Layers(layers, 2, 16, can_start_early=False),
            ],
            [
                Product("head", 3, air.vocab_size, air.hidden_size, is_fp8=False),
                Product("o", 70, *linears(air)["o"], block=(32, 32)),
            ],
        ]
    few, kinds = (1, 4, 16, 64), (torch.bfloat16, FP8)
    return [
        [
            *(Layers(layers, m, 512, can_start_early) for m in (1, 16)),
            *(case for m in few for case in (*_products("Air", air, m), *_experts("Air", air, m))),
        ],
        [
            *(Attention(air, batch, 4096, kind) for batch in (16, 64) for kind in kinds),
            *(Router(air, m) for m in (1, 16, 64)),
            *(Attention(air, *case, kind) for case in ((1, 512), (1, 2048), (16, 512), (16, 2048)) for kind in kinds),
            *(Product("head of Air", m, air.vocab_size, air.hidden_size, is_fp8=False) for m in few),
        ],
        [
            *(case for m in (512, 4096) for case in _experts("Air", air, m)),
            *(case for m in (256, 1024, 4096) for case in _products("Air", air, m)),
            *(Attention(air, batch, 32768, kind) for batch in (16, 64) for kind in kinds),
            Router(air, 1024),
        ],
        [
            *(case for m in few for case in _products("4.6", large, m, RANKS)),
            *(case for m in (*few, 512, 4096) for case in _experts("4.6", large, m, RANKS)),
            *(case for m in few for case in _products("4.6", large, m)),
        ],
        [
            *(
                Product(f"{name} of Air, per block", m, *linears(air)[name], block=(128, 128))
                for m in (1, 16, 64, 1024)
                for name in ("qkv", "down")
            ),
            *(case for m in (256, 1024, 4096) for ranks in (RANKS, 1) for case in _products("4.6", large, m, ranks)),
            *(Product("head of 4.6", m, large.vocab_size, large.hidden_size, is_fp8=False) for m in few),
        ],
    ]


def _products(name: str, config: ModelConfig, m: int, ranks: int = 1) -> list[Case]:
    """A layer's dense linears; of several ranks each has a part of the rows, or of the columns where they are inner."""
    of_ranks = f" on {ranks} ranks" if ranks > 1 else ""
    return [
        Product(f"{linear} of {name}{of_ranks}", m, *((n, k // ranks) if linear in ("o", "down") else (n // ranks, k)))
        for linear, (n, k) in linears(config).items()
    ]


def _experts(name: str, config: ModelConfig, m: int, ranks: int = 1) -> list[Case]:
    return [Expert(name, config, m, config.moe_intermediate_size // ranks, swiglu) for swiglu in (True, False)]


def compile_all(
    place: Place, machine: Machine, cases: Sequence[Case], tried: dict[str, list[Knobs]]
) -> tuple[int, dict[Key, str]]:
    """Compile the candidates on all cores. Returns how many kernels there were, and why some candidates cannot run."""
    if place.way == "triton":  # kernels of the interpreter cannot be compiled
        return 0, {}
    import triton

    if place.is_rehearsal:
        triton.runtime.driver.set_active(Card(HOPPER))
        cases = cases[:1]
    asked: list[Any] = []

    def note(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
    ) -> None:
        options = gpu.launch_options(num_warps, num_stages, starts_early=gpu.starts_early(META))
        asked.append(kernel.warmup(*arguments, grid=grid, **constants, **options))

    kernels_of: dict[Key, list[Any]] = {}
    unusable: dict[Key, str] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True) as compiling,
        mock.patch.object(gpu, "launch", note),
    ):
        for case in cases:
            work = case.work(META, lambda num_bytes: 1)
            for knobs in tried[case.what]:
                asked.clear()
                try:
                    with using(case, knobs):
                        work.calls(knobs)[0]()
                except Exception as error:
                    unusable[_key(case, knobs)] = _said(error)
                kernels_of[_key(case, knobs)] = list(asked)
        found = {id(kernel): _finished(kernel) for kernels in kernels_of.values() for kernel in kernels}
        for key, kernels in kernels_of.items():
            for kernel in kernels:
                error, shared = found[id(kernel)]
                if shared > machine.shared_memory:
                    error = f"needs {shared} bytes of shared memory"
                if error is not None:
                    unusable.setdefault(key, error)
        return len(compiling.future_kernels), unusable


def _finished(kernel: Any) -> tuple[str | None, int]:
    """Why a kernel did not compile, and the bytes of shared memory that it needs."""
    try:
        binary = kernel.result() if hasattr(kernel, "result") else kernel  # the latter if it was compiled before
    except Exception as error:
        return _said(error), 0
    return None, binary.metadata.shared


def _key(case: Case, knobs: Knobs) -> Key:
    return case.what, tuple(knobs.items())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _row(
    place: Place, machine: Machine, case: Case, tried: list[Knobs], unusable: dict[Key, str], swept: list[Swept]
) -> Row:
    work = case.work(place.device, place.copies_for)
    seconds: list[tuple[Knobs, float]] = []
    errors: list[dict[str, float | str]] = []
    with contextlib.suppress(Exception):  # the first one is to find the card as awake as the others do
        _seconds(place, case, work, tried[0], WINDOW, NUM_REPEATS)
    for knobs in tried:
        error = unusable.get(_key(case, knobs))
        if error is None:
            try:
                seconds.append((knobs, _seconds(place, case, work, knobs, WINDOW, NUM_REPEATS)))
            except Exception as failed:
                error = _said(failed)
        if error is not None:
            errors.append({**knobs, "error": error})
    if not seconds or seconds[0][0] != tried[0]:
        raise RuntimeError(f"what nextn chooses does not run: {errors[0]['error']}")
    finals, wrong = _finals(place, case, work, seconds)
    errors += [{**knobs, "error": error} for knobs, error in wrong]
    right = [one for one in seconds if one[0] not in [knobs for knobs, _ in wrong]]
    (chosen, chosen_seconds), (best, best_seconds) = finals[0], min(finals, key=lambda one: one[1])
    ratio = chosen_seconds / best_seconds
    swept.append(Swept(case, right, ratio))
    limits = [("copy bandwidth", work.num_bytes / place.copy_bandwidth)]
    if machine.fp8_flops is not None:
        limits.append(("the FP8 peak", work.flops / machine.fp8_flops))
    limit, floor = max(limits, key=lambda one: one[1])
    changes = ", ".join(f"{name} {chosen[name]} → {best[name]}" for name in chosen if chosen[name] != best[name])
    return Row(
        case.what,
        GOAL,
        1e6 * chosen_seconds,
        "µs",
        ratio,
        1e6 * best_seconds,
        f"the best of {len(seconds)}",
        f"{floor / chosen_seconds:.0%} of {limit}, best {floor / best_seconds:.0%}; {changes or 'nothing to change'}",
        (
            {**chosen, "us": 1e6 * chosen_seconds, "is": "chosen"},
            {**best, "us": 1e6 * best_seconds, "is": "best"},
            *({**knobs, "us": 1e6 * taken, "is": "swept"} for knobs, taken in seconds),
            *errors,
        ),
    )


def _seconds(place: Place, case: Case, work: Work, knobs: Knobs, window: float, num_repeats: int) -> float:
    with using(case, knobs):
        return place.seconds_per_call(work.calls(knobs), window=window, num_repeats=num_repeats)


def _finals(
    place: Place, case: Case, work: Work, seconds: list[tuple[Knobs, float]]
) -> tuple[list[tuple[Knobs, float]], list[tuple[Knobs, str]]]:
    """The chosen candidate, and the fastest ones that are right, timed by turns; and those that are wrong."""
    _check(case, work, seconds[0][0])
    finalists = [seconds[0][0]]
    wrong: list[tuple[Knobs, str]] = []
    for knobs, _ in sorted(seconds[1:], key=lambda one: one[1]):
        if len(finalists) > NUM_FINALISTS:
            break
        try:
            _check(case, work, knobs)
            finalists.append(knobs)
        except AssertionError as error:
            wrong.append((knobs, _said(error)))
    times: list[list[float]] = [[] for _ in finalists]
    for _ in range(NUM_FINALS if not place.is_rehearsal else 1):
        for taken, knobs in zip(times, finalists, strict=True):
            taken.append(_seconds(place, case, work, knobs, 2 * WINDOW, NUM_REPEATS))
    return [(knobs, statistics.median(taken)) for knobs, taken in zip(finalists, times, strict=True)], wrong


def _check(case: Case, work: Work, knobs: Knobs) -> None:
    with poisoned(), using(case, knobs):
        got = work.calls(knobs)[0]()
    work.check(got)


def _summary(family: str, swept: list[Swept]) -> Row:
    """What the family would gain, and what by each knob alone, in geometric means."""
    gains = sorted((_gain(knob, swept) for knob in swept[0].seconds[0][0]), key=lambda one: -one[1])
    ratio = statistics.geometric_mean(one.ratio for one in swept)
    said = "; ".join(f"{knob} {gain:.3f} ({values})" for knob, gain, values in gains[:3] if gain > 1.005)
    return Row(
        f"{family}: chosen / best over {len(swept)} cases",
        GOAL,
        ratio,
        "×",
        ratio,
        note=f"by one knob alone: {said or 'nothing'}",
        details=tuple({"knob": knob, "gain": gain, "values": values} for knob, gain, values in gains),
    )


def _gain(knob: str, swept: list[Swept]) -> tuple[str, float, str]:
    """What changing nothing but this knob brings, as the sweep saw it, and the commonest changes."""
    ratios, moves = [], Counter[str]()
    for one in swept:
        (chosen, taken), *others = one.seconds
        alone = [(knobs[knob], other) for knobs, other in others if {**knobs, knob: chosen[knob]} == chosen]
        value, best = min([(chosen[knob], taken), *alone], key=lambda found: found[1])
        ratios.append(taken / best)
        if best < 0.98 * taken:
            moves[f"{chosen[knob]} → {value}"] += 1
    return knob, statistics.geometric_mean(ratios), ", ".join(f"{move} in {n}" for move, n in moves.most_common(3))
