"""What a lost quantization config costs on the card: benchmarks/draft_quant.py, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.place import OutOfTimeError, Place
from benchmarks.gpu.row import Goal, Outcome, Row

GOAL = Goal(at_least=1.8)
ROOT = Path(__file__).parents[2]


def run(command: list[str], deadline: float) -> None:
    """Raises RuntimeError if it fails, OutOfTimeError if it takes until the deadline; with the end of what it said.

    Not through a pipe, which whatever the command has started would hold open.
    """
    name = " ".join(command[1:3])
    with tempfile.TemporaryFile("w+") as log:

        def said() -> str:
            log.seek(0)
            return log.read()[-1500:]

        try:
            left = max(deadline - time.monotonic(), 0)
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            raise OutOfTimeError(f"out of time in {name}: {said()}") from None
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: {said()}")


def measure(place: Place) -> Iterator[Outcome]:
    scale = (
        ("--num-prompts", "24", "--rounds", "3") if not place.is_rehearsal else ("--num-prompts", "2", "--rounds", "1")
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        flags = ["--device", place.device.type, "--streams", "1", "--ways", "kept", "dropped", "off", *scale]
        run([sys.executable, "-m", "benchmarks.draft_quant", *flags, "--json", str(file)], place.deadline)
        rows = {row["draft"]: row for row in json.loads(file.read_text())["rows"]}
    kept, dropped, off = rows["kept"], rows["dropped"], rows["off"]
    yield Row(
        "embedded model over HTTP, 1 stream, draft kept against dropped",
        GOAL,
        kept["tok/s"],
        "tok/s",
        kept["against dropped"],
        dropped["tok/s"],
        "draft without its scales",
        f"off {off['tok/s']:.0f} tok/s; accept lengths {kept['accept length']:.2f} and {dropped['accept length']:.2f}; "
        f"answers as without drafts {kept['same answers']:.0%}",
    )
