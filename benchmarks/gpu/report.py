"""The table on the screen, in Markdown, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.row import Failure, Goal, Machine, Outcome, Row

COLUMNS = ("what", "goal", "measured", "floor or rival", "ratio", "met", "note")


def cells(outcome: Row | Failure, *, is_rehearsal: bool = False) -> tuple[str, ...]:
    """A line of the table."""
    if isinstance(outcome, Failure):
        return outcome.what, "", "", "", "", "FAILED", " ".join(outcome.error.split())[:300]
    against = "" if outcome.against is None else f"{outcome.against:.4g} {outcome.unit}, {outcome.against_what}"
    return (
        outcome.what,
        str(outcome.goal),
        f"{outcome.measured:.4g} {outcome.unit}",
        against,
        f"{outcome.ratio:.3g}",
        "rehearsed" if is_rehearsal else "" if outcome.goal == Goal() else "yes" if outcome.is_met else "NO",
        " ".join(outcome.note.split()),
    )


def headline(machine: Machine | None, date: str, commit: str, is_rehearsal: bool) -> str:
    parts = [date, f"commit {commit}"]
    if machine is not None:
        limits = [
            f"copy {machine.copy_bandwidth / 1e12:.2f} TB/s" if machine.copy_bandwidth else "copy bandwidth unknown",
            f"dense FP8 product {machine.fp8_flops / 1e12:.0f} TFLOP/s" if machine.fp8_flops else "FP8 peak unknown",
        ]
        parts = [machine.card, f"driver {machine.driver}", machine.versions, *parts, *limits]
    return ("REHEARSAL, figures mean nothing: " if is_rehearsal else "") + "; ".join(parts)


def as_markdown(title: str, found: Mapping[str, Sequence[Outcome]], *, is_rehearsal: bool) -> str:
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for outcomes in found.values():
        for outcome in outcomes:
            if not isinstance(outcome, Machine):
                line = (cell.replace("|", "/") for cell in cells(outcome, is_rehearsal=is_rehearsal))
                lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def as_json(
    title: str, machine: Machine | None, found: Mapping[str, Sequence[Outcome]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    def plain(outcome: Row | Failure) -> dict[str, Any]:
        if isinstance(outcome, Failure):
            return asdict(outcome)
        return {**asdict(outcome), "is_met": outcome.is_met}

    return {
        "title": title,
        "machine": None if machine is None else asdict(machine),
        "sections": {
            name: {
                "seconds": round(seconds[name], 1),
                "rows": [plain(one) for one in outcomes if isinstance(one, Row)],
                "failures": [plain(one) for one in outcomes if isinstance(one, Failure)],
            }
            for name, outcomes in found.items()
        },
    }


def write(path: Path | None, content: str | dict[str, Any]) -> None:
    """In place of what was there, whole at any time."""
    if path is not None:
        new = path.with_name(f"{path.name}.new")
        new.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
        new.replace(path)
