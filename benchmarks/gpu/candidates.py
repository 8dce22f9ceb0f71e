"""What can be tuned: kernels in the published shapes, and the ways to cut them up that are tried.

A way is a dict of knobs: the fields of a kernel's config, and constants beside it, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Protocol, TypeVar
from unittest import mock

import torch

from benchmarks.gpu.row import Machine

T = TypeVar("T")
Knobs = dict[str, int]
Axes = Sequence[dict[str, Sequence[int]]]
"""Knobs that are varied together, each over these values."""
Patches = Sequence[tuple[object, str, object]]
"""(module, name, value) that make nextn take some knobs."""
Copies = Callable[[int], int]
"""How many copies of so many bytes to read in turn."""

PREFETCHES = (0, 256, 512, 1024, 2048)
NUM_WARPS = (4, 8)


@dataclass(frozen=True)
class Work:
    """calls: in turn, with some knobs; check: raises AssertionError if the first call's result is wrong

    num_bytes, flops: of a call
    """

    calls: Callable[[Knobs], Sequence[Callable[[], Any]]]
    check: Callable[[Any], None]
    num_bytes: float
    flops: float


class Case(Protocol):
    """A kernel in one shape. Names of knobs are those of the kernel's config, where they are not said otherwise."""

    @property
    def family(self) -> str: ...

    @property
    def what(self) -> str: ...

    def chosen(self, machine: Machine) -> Knobs:
        """What nextn takes."""

    def axes(self, chosen: Knobs) -> Axes: ...

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        """Whether it is worth compiling."""

    def patches(self, knobs: Knobs) -> Patches: ...

    def work(self, device: torch.device, copies: Copies) -> Work: ...


@contextmanager
def using(case: Case, knobs: Knobs) -> Iterator[None]:
    """nextn takes these knobs."""
    with ExitStack() as patches:
        for owner, name, value in case.patches(knobs):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


def candidates(case: Case, machine: Machine) -> list[Knobs]:
    """What nextn takes, first, and its neighbours along every axis."""
    chosen = case.chosen(machine)
    found = {tuple(chosen.items()): chosen}
    for axis in case.axes(chosen):
        for values in product(*axis.values()):
            knobs = {**chosen, **dict(zip(axis, values, strict=True))}
            if case.fits(knobs, machine):
                found.setdefault(tuple(knobs.items()), knobs)
    return list(found.values())


def around(value: int, least: int, most: int) -> tuple[int, ...]:
    """Half, as it is, and twice, within bounds."""
    return tuple(near for near in (value // 2, value, 2 * value) if near == value or least <= near <= most)


def powers(most: int, *others: int) -> tuple[int, ...]:
    return tuple(sorted({*(1 << i for i in range(most.bit_length())), *others}))


def config_of_knobs(kind: type[T], knobs: Knobs) -> Callable[..., T]:
    """A choose_config that always chooses the same."""
    config = kind(**{field.name: knobs[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    return lambda *arguments, **options: config
