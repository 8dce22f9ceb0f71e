"""Measure nextn on one NVIDIA card, against the floors and rivals of the same run, in ten minutes at most.

    python -m benchmarks.gpu --json gpu.json --markdown gpu.md

Sections: {sections};
and, where --only names it: tuning, which sweeps the kernels' tile sizes instead.
Each runs in a process of its own and has a share of the time; what one leaves over the next ones have. One that fails
is reported with its error, and does not stop the others. The files are written anew after every figure. Every kernel
is held to a float64 reference before it is timed. Ends with exit code 1 if a section failed or a goal was not met.

--rehearse runs everything with tiny shapes on a CPU, in Triton's interpreter, which takes minutes; --rehearse torch
with the kernels' torch references. The figures of a rehearsal mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.isolation import run_here, run_isolated
from benchmarks.gpu.place import Place, Way
from benchmarks.gpu.report import as_json, as_markdown, cells, headline, write
from benchmarks.gpu.row import Failure, Machine, Outcome, Row

SECTIONS = {
    "machine": 15,
    "tests": 115,
    "compiling": 30,
    "model": 140,
    "moe": 40,
    "attention": 35,
    "matmul": 55,
    "embedded": 50,
    "draft": 60,
}
"""Seconds of each, or its share of TOTAL."""
ASKED_FOR = {"tuning": 520}
"""Alike, of those that run only if they are named by --only."""
TOTAL = 540
"""Ten minutes, less what starting Python and building take."""
MODULES = {name: name for name in SECTIONS | ASKED_FOR} | {"tests": "tests_on_gpu"}


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").format(sections=", ".join(SECTIONS)),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--only",
        nargs="+",
        choices=[*SECTIONS, *ASKED_FOR],
        metavar="SECTION",
        help="these; the machine is always measured",
    )
    skippable = [name for name in SECTIONS if name != "machine"]
    made.add_argument("--skip", nargs="+", choices=skippable, metavar="SECTION", default=[], help="all but these")
    made.add_argument("--seconds", type=float, default=TOTAL, help="for everything; default: %(default)s")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here")
    made.add_argument(
        "--rehearse", nargs="?", const="triton", choices=("triton", "torch"), help="tiny shapes, on a CPU"
    )
    made.add_argument("--commit", metavar="NAME", help="of what is measured; default: what git says")
    made.add_argument("--in-process", action="store_true", help="without a process per section, for a debugger")
    options = made.parse_args(arguments)
    way: Way = options.rehearse or "gpu"
    is_rehearsal = way != "gpu"
    if not is_rehearsal and not _has_gpu():
        made.error(
            "torch finds no NVIDIA GPU; install its CUDA build and a driver, or try the script by --rehearse torch"
        )
    if way == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before nextn's are imported
    parts = SECTIONS | ASKED_FOR
    chosen = [
        name for name in parts if name == "machine" or (name in (options.only or SECTIONS) and name not in options.skip)
    ]
    modules = {name: import_module(f"benchmarks.gpu.{MODULES[name]}") for name in chosen}
    run = run_here if options.in_process else run_isolated

    date, commit = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), options.commit or _commit()
    machine: Machine | None = None
    found: dict[str, list[Outcome]] = {}
    seconds: dict[str, float] = {}
    share = options.seconds / sum(parts[name] for name in chosen)
    deadline = time.monotonic()

    def save() -> None:
        title = headline(machine, date, commit, is_rehearsal)
        write(options.markdown, as_markdown(title, found, is_rehearsal=is_rehearsal))
        write(options.json, as_json(title, machine, found, seconds))

    for name in chosen:
        deadline += parts[name] * share
        started = time.monotonic()
        found[name] = []
        print(f"[{name}]", flush=True)
        for outcome in run(name, modules[name].measure, Place(way, deadline, machine)):
            if isinstance(outcome, Failure) and outcome.what == "section":
                outcome = replace(outcome, what=name)
            found[name].append(outcome)
            if isinstance(outcome, Machine):
                machine = outcome
            else:
                print(
                    "  " + "  |  ".join(cell for cell in cells(outcome, is_rehearsal=is_rehearsal) if cell), flush=True
                )
            seconds[name] = time.monotonic() - started
            save()
        seconds[name] = time.monotonic() - started
        save()
    title = headline(machine, date, commit, is_rehearsal)
    print("\n" + as_markdown(title, found, is_rehearsal=is_rehearsal))
    outcomes = [outcome for of_section in found.values() for outcome in of_section]
    has_failed = any(isinstance(outcome, Failure) for outcome in outcomes)
    is_missed = any(isinstance(outcome, Row) and not outcome.is_met for outcome in outcomes)
    return int(has_failed or (is_missed and not is_rehearsal))


def _has_gpu() -> bool:
    """Asked of another process: this one is forked, and must not touch the card."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, check=False).returncode == 0


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
