"""What a section of the measurement says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """Bounds of a ratio; None is no bound."""

    at_least: float | None = None
    at_most: float | None = None

    def is_met_by(self, ratio: float) -> bool:
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    def __str__(self) -> str:
        bounds = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return ", ".join(bounds) or "none"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    what: what was measured; measured: in ``unit``
    against: the floor or the rival, in the same unit, and ``against_what`` it is; None where the goal is absolute
    ratio: what the goal bounds
    details: figures for the JSON file alone
    """

    what: str
    goal: Goal
    measured: float
    unit: str
    ratio: float
    against: float | None = None
    against_what: str = ""
    note: str = ""
    details: tuple[dict[str, float | str], ...] = ()

    @property
    def is_met(self) -> bool:
        return self.goal.is_met_by(self.ratio)


@dataclass(frozen=True)
class Failure:
    """Something that could not be measured. error: for a person; trace: for whoever mends it."""

    what: str
    error: str
    trace: str = ""


@dataclass(frozen=True)
class Machine:
    """The card, what runs on it, and its measured limits.

    copy_bandwidth: bytes read and written per second; fp8_flops: of a large dense product; None where unknown
    capability: compute capability; processors: its number; shared_memory: bytes a program can have
    """

    card: str
    driver: str
    versions: str
    memory: int
    copy_bandwidth: float | None
    fp8_flops: float | None
    capability: tuple[int, int] = (9, 0)
    processors: int = 132
    shared_memory: int = 227 << 10


Outcome = Row | Failure | Machine
