"""What a lost quantization config costs on the card: benchmarks/draft_quant.py, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.place import Place
from benchmarks.gpu.row import Goal, Outcome, Row

GOAL = Goal(at_least=1.8)


def measure(place: Place) -> Iterator[Outcome]:
    scale = (
        ("--num-prompts", "24", "--rounds", "3") if not place.is_rehearsal else ("--num-prompts", "2", "--rounds", "1")
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        flags = ["--device", place.device.type, "--streams", "1", "--ways", "kept", "dropped", "off", *scale]
        command = [sys.executable, "-m", "benchmarks.draft_quant", *flags, "--json", str(file)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:3])} ended with {done.returncode}: {done.stderr[-1500:]}")
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
