"""Compile GLM-4.5-Air's kernels on all cores before they are needed, as Triton itself would one by one.

Public functions run on tensors without memory, and each launch asks Triton to compile, which keeps the result on disk
for the sections that follow. Whatever is not met here is compiled there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels import gpu

from benchmarks.gpu.place import Place
from benchmarks.gpu.row import Goal, Machine, Outcome, Row
from tests.headers import published_config
from tests.kernels.published import PARTS

NUM_TOKENS = (1, 4, 16, 64, 512)
HOPPER = Machine("", "", "", 0, None, None, (9, 0), 132, 227 << 10)
"""What a rehearsal compiles for."""


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def measure(place: Place) -> Iterator[Outcome]:
    started = time.monotonic()
    machine = HOPPER if place.is_rehearsal or place.machine is None else place.machine
    launches = launches_of(machine, NUM_TOKENS if not place.is_rehearsal else NUM_TOKENS[1:2])
    if place.way == "triton":  # kernels of the interpreter cannot be compiled
        launches = []
    elif place.is_rehearsal:
        launches = launches[:4]
    context = multiprocessing.get_context("fork")
    num = max(min((os.cpu_count() or 2) - 1, len(launches)), 1)
    results = context.SimpleQueue()
    processes = [context.Process(target=_compile, args=(launches[i::num], machine, results)) for i in range(num)]
    for process in processes:
        process.start()
    errors = [error for _ in launches if (error := results.get()) is not None]
    for process in processes:
        process.join()
    yield Row(
        "kernels that do not compile, of GLM-4.5-Air's",
        Goal(at_most=0),
        len(errors),
        f"of {len(launches)}",
        len(errors),
        note=f"{time.monotonic() - started:.0f} s on {num} cores{'; ' if errors else ''}{'; '.join(errors)[:300]}",
        details=tuple({"error": error} for error in errors),
    )


def launches_of(machine: Machine, num_tokens: tuple[int, ...]) -> list[Launch]:
    """What Air launches on the card, each specialisation once as far as sizes, types and constants tell."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        shown = [(x.dtype, x.dim()) if isinstance(x, torch.Tensor) else _shown(x) for x in arguments]
        found.setdefault(f"{kernel.__name__} {shown} {options}", Launch(kernel, arguments, options))

    config = ModelConfig.from_dict(published_config("glm-4.5-air", "channel"))
    has_fp8_units = machine.capability >= (8, 9)
    with mock.patch.multiple(
        gpu,
        launch=record,
        suits=lambda *tensors: True,
        has_fp8_units=lambda device: has_fp8_units,
        has_descriptors=lambda device: machine.capability >= (9, 0),
        starts_early=lambda device: machine.capability >= (9, 0),
        num_processors=lambda device: machine.processors,
        shared_memory=lambda device: machine.shared_memory,
    ):
        for tokens in num_tokens:
            for part in PARTS:
                for _, call in part.launches(config, tokens, has_fp8_units):
                    call()
    return list(found.values())


def _shown(x: object) -> object:
    """Of an integer, what Triton may specialise for; of others everything."""
    return (x == 1, x % 16 == 0) if isinstance(x, int) else str(x)


class _Card:
    """Stands where Triton asks for the card that is there; so nothing here opens it."""

    def __init__(self, machine: Machine) -> None:
        self._capability = machine.capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self._capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(launches: list[Launch], machine: Machine, results: Any) -> None:
    from triton.runtime import driver

    driver.set_active(_Card(machine))  # type: ignore[arg-type]
    for kernel, arguments, options in launches:
        try:
            constants = dict(options)
            num_warps, num_stages = constants.pop("num_warps", 4), constants.pop("num_stages", 1)
            filled = gpu.launch_options(num_warps, num_stages, starts_early=machine.capability >= (9, 0))
            kernel.run(*arguments, grid=(1,), warmup=True, **constants, **filled)
            results.put(None)
        except Exception as error:
            results.put(f"{kernel.__name__}: {type(error).__name__}: {str(error)[:200]}")
