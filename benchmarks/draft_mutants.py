"""Does a wrong draft stay unnoticed? Each known way to break one, injected once; and the model as it is, which is fine.

    load     the loader refuses the checkpoint
    canary   the trial at start calls the draft sick
    monitor  acceptance while serving does, within the traffic of this run
    shadow   requests scored again without speculation come out otherwise
    tests    the first test that fails, with the fault in the code (faults of files are for the loader's own tests)

Seconds are from the start of that stage, the tests' with the start of pytest. Traffic is varied: greedy and sampled,
short, long and chunked prompts, shared prefixes, 1 to 16 requests at a time, 3 drafts per step; half of the traffic to
the model as it is has the default's number of drafts. With --quick the tests do not run.
Ends with exit code 1 if a fault stays unnoticed, or if anything is said of the model as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nextn.demo import checkpoint_dir
from nextn.demo.quiz import held_out_items
from nextn.errors import NextnError
from nextn.llm import LLM, SamplingParams

from benchmarks.common import parser, report
from benchmarks.mutants import MUTANTS, spoil_files

CLEAN = "none"
NOT_RUN = "not run"
TESTS = (
    "tests/speculative/test_proposer.py",
    "tests/checkpoint",
    "tests/speculative",
    "tests/execution",
    "tests/models",
    "tests/scheduler",
    "tests/text",
)
NUM_AT_A_TIME = (1, 4, 1, 16, 2, 1, 8)
OPTIONS: dict[str, Any] = {
    "speculative_shadow_rate": 1.0,
    "chunked_prefill_size": 256,
    "max_total_tokens": 16384,
    "max_running_requests": 16,
}


@dataclass(frozen=True)
class Findings:
    """When each stage noticed, empty where it did not; and what the log said."""

    load: str = ""
    canary: str = ""
    monitor: str = ""
    shadow: str = ""
    complaints: tuple[str, ...] = ()

    @property
    def is_noticed(self) -> bool:
        return any((self.load, self.canary, self.monitor, self.shadow, self.complaints))


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=[CLEAN, *MUTANTS], metavar="FAULT", help="just these")
    made.add_argument("--num-requests", type=int, help="to each mutant; default: 200, with --quick 96")
    made.add_argument("--num-clean-requests", type=int, help="to the model as it is; default: 1000, with --quick 200")
    args = made.parse_args()
    names = args.only or [CLEAN, *MUTANTS]
    num_requests = args.num_requests or (96 if args.quick else 200)
    num_clean = args.num_clean_requests or (200 if args.quick else 1000)
    model = args.model_path or str(checkpoint_dir())
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        rows = list(pool.imap(partial(examine, model, num_requests, num_clean, args.quick), names))
    report("Broken drafts, and who notices", rows, args.json)
    wrong = [row for row in rows if row["noticed"] == ("yes" if row["fault"] == CLEAN else "no")]
    for row in wrong:
        print(f"\n{'a false alarm' if row['fault'] == CLEAN else 'nobody noticed'}: {row['what']}")
    return 1 if wrong else 0


def examine(model: str, num_requests: int, num_clean: int, is_quick: bool, fault: str) -> dict[str, Any]:
    """One row of the table. Runs in a process of its own."""
    torch.set_num_threads(1)
    if fault == CLEAN:
        default, fixed = run(model, num_clean // 2, None), run(model, num_clean - num_clean // 2, 3)
        for complaint in (*default.complaints, *fixed.complaints):
            print(f"false alarm: {complaint}")
        return _row(fault, f"the model as it is, {num_clean} requests", fixed if fixed.is_noticed else default, "")
    mutant = MUTANTS[fault]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        shutil.copytree(model, folder)
        spoil_files(mutant, folder)
        if mutant.apply is not None:
            mutant.apply()
        found = run(str(folder), num_requests, 3)
    if mutant.apply is None:
        return _row(fault, mutant.what, found, "")
    return _row(fault, mutant.what, found, NOT_RUN if is_quick else run_tests(fault))


def _row(fault: str, what: str, found: Findings, tests: str) -> dict[str, Any]:
    noticed = "yes" if found.is_noticed or tests not in ("", NOT_RUN) else "not known" if tests == NOT_RUN else "no"
    return {
        "fault": fault,
        "what": what,
        "load": found.load,
        "canary": found.canary,
        "monitor": found.monitor,
        "shadow": found.shadow,
        "tests": tests,
        "noticed": noticed,
    }


def run(folder: str, num_requests: int, num_drafts: int | None) -> Findings:
    """Load and serve, until both of those that watch have noticed something, or all requests are done."""
    started = time.monotonic()
    with complaints() as said:
        try:
            llm = LLM(folder, speculative_num_steps=num_drafts, **OPTIONS)
        except NextnError:
            return Findings(load=_after(started))
        canary = llm.engine.draft_health().canary
        noticed: dict[str, str] = {}
        done = 0
        requests = varied_requests(llm, num_requests)
        sizes = itertools.cycle(NUM_AT_A_TIME)
        started = time.monotonic()
        while done < num_requests and len(noticed) < 2:
            prompts, params = zip(*requests[done : done + next(sizes)], strict=True)
            llm.generate(prompts, params)
            done += len(prompts)
            health = llm.engine.draft_health()
            if health.state in ("collapsed", "never_healthy"):
                noticed.setdefault("monitor", f"{_after(started)}, {done} requests")
            if health.shadow is not None and health.shadow.num_disagreements:
                noticed.setdefault("shadow", f"{_after(started)}, {done} requests")
    return Findings(
        canary=f"{canary.seconds:.1f} s" if canary.verdict == "sick" else "",
        complaints=tuple(said),
        **noticed,
    )


def run_tests(fault: str) -> str:
    """The first of the project's tests that fails with the fault, and after how long; empty if none does."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.mutants", fault, "-xq", *TESTS]
    # The tests see to this themselves, but only where nothing of nextn was imported before them.
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **interpreted}
    place = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    first = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py(?:::\w+)?)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return ""
    if first is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return f"{_after(started)}, {first[1]}"


def varied_requests(llm: LLM, num: int) -> list[tuple[list[int], SamplingParams]]:
    """The same for the same number: what users send, in all lengths and with all kinds of sampling."""
    rng = random.Random("varied")
    texts = [item.prompt for item in held_out_items(seed=3, num_quiz=num, num_tools=num, num_open=num)]
    rng.shuffle(texts)
    ids = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    shared = [[token for one in rng.sample(ids, 20) for token in one][:length] for length in (200, 500, 900)]
    requests = []
    for i in range(num):
        prompt = ids[i % len(ids)]
        if rng.random() < 0.3:
            prompt = [*rng.choice(shared), *prompt]
        requests.append((prompt, _varied_params(rng)))
    return requests


def _varied_params(rng: random.Random) -> SamplingParams:
    values: dict[str, Any] = {"max_new_tokens": rng.choice([8, 24, 48, 96]), "temperature": 0.0}
    if rng.random() < 0.5:
        values["temperature"] = rng.choice([0.3, 0.7, 1.0])
        values.update(rng.choice([{}, {"top_k": 8}, {"top_p": 0.9}, {"min_p": 0.05}]))
        values["seed"] = rng.choice([None, rng.getrandbits(32)])
    if rng.random() < 0.1:
        values.update(rng.choice([{"repetition_penalty": 1.1}, {"frequency_penalty": 0.3}, {"min_new_tokens": 8}]))
    return SamplingParams(**values)


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Warnings and errors in the log, which go nowhere else meanwhile."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("nextn")
    collector = Collector(logging.WARNING)
    logger.addHandler(collector)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagated


def _after(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
