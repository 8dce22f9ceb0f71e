"""``pytest -m gpu``, a process per test function, several at once: most of their time goes into compiling kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.place import OutOfTimeError, Place
from benchmarks.gpu.row import Failure, Goal, Outcome, Row

ROOT = Path(__file__).parents[2]
MAX_PROCESSES = 12
MARGIN = 2.0
"""Seconds before the deadline at which what is still running is given up."""
NONE = Goal(at_most=0)
NEEDS_GPU = "NEXTN_TESTS_NEED_GPU"
"""With it in the environment, tests without a GPU fail; else they would run in Triton's interpreter."""


def measure(place: Place) -> Iterator[Outcome]:
    """A row per file, as soon as all its functions have run."""
    functions = functions_of_gpu()
    if place.is_rehearsal:
        functions = {"tests/gpu/test_sanitizer.py": ["test_kernels_neither_leave_their_memory_nor_race"]}
    pool = ThreadPoolExecutor(max(min(MAX_PROCESSES, (os.cpu_count() or 2) - 2), 1))
    needs_gpu = not place.is_rehearsal
    running = {
        pool.submit(run, file, name, needs_gpu=needs_gpu): file for file, names in functions.items() for name in names
    }
    try:
        yield from _rows(running, place.deadline - MARGIN)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _rows(running: dict[Future[ElementTree.Element], str], deadline: float) -> Iterator[Outcome]:
    left = set(running)
    reports: dict[str, list[ElementTree.Element]] = {}
    try:
        for done in as_completed(running, timeout=max(deadline - time.monotonic(), 0)):
            left.remove(done)
            file = running[done]
            try:
                reports.setdefault(file, []).append(done.result())
            except Exception as error:
                yield Failure(f"pytest -m gpu {file}", f"{type(error).__name__}: {error}")
            if file in reports and not any(running[other] == file for other in left):
                yield row_of(file, reports[file])
    except TimeoutError:
        files = sorted({running[one] for one in left})
        yield from (row_of(file, reports[file]) for file in files if file in reports)
        raise OutOfTimeError(f"out of time with {len(left)} test functions left, of {', '.join(files)}") from None


def functions_of_gpu() -> dict[str, list[str]]:
    """Test functions of kernels or of a GPU by file: first those of whole engines, then the longest file.

    Without those of compute-sanitizer, which take minutes each.
    """
    found: dict[str, list[str]] = {}
    paths = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_sanitizer.py"]
    for path in sorted(paths, key=lambda path: (path.parent.name not in ("gpu", "execution"), -path.stat().st_size)):
        text = path.read_text()
        names = [
            name
            for name, arguments in re.findall(r"^def (test_\w+)\(([^)]*)\)", text, re.MULTILINE)
            if "pytestmark = pytest.mark.gpu" in text or re.search(r"\b(device|cuda): ", arguments)
        ]
        if names:
            found[str(path.relative_to(ROOT))] = names
    return found


def run(file: str, name: str, *, needs_gpu: bool = True) -> ElementTree.Element:
    """Returns pytest's report, as JUnit writes them. Raises RuntimeError if there is none, as without a GPU."""
    environment = {**os.environ, NEEDS_GPU: "1"} if needs_gpu else None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", f"{file}::{name}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or not report.exists():  # neither passed nor failed
            raise RuntimeError(f"pytest {name} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return ElementTree.parse(report).getroot()


def row_of(file: str, reports: Sequence[ElementTree.Element]) -> Row:
    bad: list[dict[str, float | str]] = []
    num = num_skipped = 0
    for case in (case for report in reports for case in report.iter("testcase")):
        num += 1
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        num_skipped += case.find("skipped") is not None
        if problem is not None:
            bad.append({"test": case.get("name", ""), "message": problem.get("message", "")[:500]})
    seconds = sum(float(suite.get("time", "0")) for report in reports for suite in report.iter("testsuite"))
    failed = "; failed: " + ", ".join(str(one["test"]) for one in bad) if bad else ""
    return Row(
        f"pytest -m gpu {file}",
        NONE,
        num - num_skipped - len(bad),
        "passed",
        len(bad),
        note=f"{len(bad)} failed, {num_skipped} skipped, {seconds:.0f} s{failed}"[:400],
        details=tuple(bad),
    )
