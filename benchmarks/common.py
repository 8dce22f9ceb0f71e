"""What every benchmark shares: arguments, prompts, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nextn.demo.quiz import held_out_items
from nextn.text.tokenizer import Tokenizer


def parser(description: str | None) -> argparse.ArgumentParser:
    """--model-path, --quick and --json; a script adds its own."""
    module = sys.modules["__main__"].__spec__
    made = argparse.ArgumentParser(
        prog=None if module is None else f"python -m {module.name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model-path", help="checkpoint folder; default: the embedded model")
    made.add_argument("--quick", action="store_true", help="fewer repetitions, a minute or two on 2 cores")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return made


def prompts(tokenizer: Tokenizer, num: int) -> list[list[int]]:
    """``num`` different held-out conversations with open answers, as token ids."""
    drawn = held_out_items(seed=7, num_quiz=0, num_tools=0, num_open=2 * num + 8)[:num]
    assert len(drawn) == num, "draws that repeat a prompt are left out; draw more"
    return [tokenizer.encode(item.prompt, add_special_tokens=False) for item in drawn]


def alternate(sides: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Run each side once to warm up, then all in turn, A B A B …, so that a drift of the machine meets all alike."""
    for run in sides.values():
        run()
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, run in sides.items():
            figures[name].append(run())
    return figures


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def report(title: str, rows: Sequence[dict[str, Any]], json_path: Path | None) -> None:
    """Print a table, one line per row, and write the JSON file where one is asked for."""
    columns = list(rows[0])
    cells = [[_shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    machine = f"{os.cpu_count()}-core {platform.machine()}, torch {torch.__version__}"
    print(f"\n{title} ({machine})")
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if json_path is not None:
        json_path.write_text(json.dumps({"title": title, "machine": machine, "rows": list(rows)}, indent=2) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
