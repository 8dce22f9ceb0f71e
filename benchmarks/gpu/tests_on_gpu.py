"""``pytest -m gpu``, a process per file and several at once: most of their time goes into compiling kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.place import Place
from benchmarks.gpu.row import Failure, Goal, Outcome, Row

ROOT = Path(__file__).parents[2]
MAX_PROCESSES = 8
NONE = Goal(at_most=0)


def measure(place: Place) -> Iterator[Outcome]:
    files = test_files() if not place.is_rehearsal else ["tests/gpu/test_sanitizer.py"]
    processes = max(min(MAX_PROCESSES, (os.cpu_count() or 2) // 2), 1)
    with ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(run, file): file for file in files}
        for done in as_completed(running):
            try:
                yield done.result()
            except Exception as error:
                yield Failure(f"pytest -m gpu {running[done]}", f"{type(error).__name__}: {error}")


def test_files() -> list[str]:
    """Files with tests of kernels or of a GPU, the longest first."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if "device: torch.device" in path.read_text()]
    found += (ROOT / "tests" / "gpu").glob("test_*.py")
    return [str(path.relative_to(ROOT)) for path in sorted(set(found), key=lambda path: -path.stat().st_size)]


def run(file: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return row_of(file, ElementTree.parse(report).getroot())


def row_of(file: str, report: ElementTree.Element) -> Row:
    """report: pytest's, as JUnit writes them."""
    bad: list[dict[str, float | str]] = []
    num = num_skipped = 0
    for case in report.iter("testcase"):
        num += 1
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        num_skipped += case.find("skipped") is not None
        if problem is not None:
            bad.append({"test": case.get("name", ""), "message": problem.get("message", "")[:500]})
    seconds = sum(float(suite.get("time", "0")) for suite in report.iter("testsuite"))
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
