"""The measurement on a GPU, as far as a machine without one can try it: every section runs, and none stops another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.verify import NO_TOKEN

from benchmarks.gpu import draft, place, tuning
from benchmarks.gpu.__main__ import ASKED_FOR, SECTIONS, TOTAL
from benchmarks.gpu.candidates import Axes, Copies, Knobs, Patches, Work
from benchmarks.gpu.floors import BF16, FP8, best_ratio, step_bytes
from benchmarks.gpu.isolation import run_isolated
from benchmarks.gpu.model import idle_share, layers_that_fit, pinned
from benchmarks.gpu.place import OutOfTimeError, Place, check
from benchmarks.gpu.report import as_markdown, cells
from benchmarks.gpu.row import Failure, Goal, Machine, Outcome, Row
from benchmarks.gpu.tests_on_gpu import functions_of_gpu, row_of, run
from tests.headers import published_config

ROOT = Path(__file__).parents[2]
AIR = ModelConfig.from_dict(published_config("glm-4.5-air", "channel"))


def rehearse(*flags: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_a_gpu_one_line_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("python -m benchmarks.gpu: error: torch finds no NVIDIA GPU")


def test_every_section_says_what_it_measured_in_both_files(tmp_path: Path) -> None:
    files = tmp_path / "gpu.json", tmp_path / "gpu.md"
    # These two start processes of their own, of which other tests know.
    printed = rehearse(
        "--rehearse", "torch", "--skip", "tests", "draft", "--json", str(files[0]), "--markdown", str(files[1])
    )
    found: dict[str, Any] = json.loads(files[0].read_text())
    table = files[1].read_text()
    assert set(found["sections"]) == set(SECTIONS) - {"tests", "draft"}
    for name, section in found["sections"].items():
        assert section["failures"] == []
        assert section["rows"] or name == "machine"
        for row in section["rows"]:
            assert row["what"] in table
            assert row["what"] in printed
            assert row["ratio"] >= 0
    assert found["machine"]["copy_bandwidth"] > 0
    assert table.startswith("REHEARSAL")
    assert "| rehearsed |" in table
    drafted = [row["what"] for row in found["sections"]["model"]["rows"] if "3 drafts" in row["what"]]
    assert drafted
    assert all("accept length 3.00" in what for what in drafted)


def test_kernels_run_in_tritons_interpreter_and_are_held_to_float64() -> None:
    assert "FP8 KV" in rehearse("--rehearse", "--only", "attention")


def test_kernels_are_swept_only_where_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    rehearse("--rehearse", "--only", "tuning", "--json", str(file))
    section = json.loads(file.read_text())["sections"]["tuning"]
    assert section["failures"] == []
    rows = {row["what"]: row for row in section["rows"]}
    for family in (
        "W8A8 products",
        "block-FP8 products",
        "experts' w2",
        "decode attention",
        "router",
        "decoder layers",
    ):
        assert any(what.startswith(family) and "chosen / best" in what for what in rows), family
    swept = rows["qkv, 128 × 48, M = 3"]
    chosen, best, *others = swept["details"]
    assert (chosen["is"], best["is"]) == ("chosen", "best")
    assert [other["num_stages"] for other in others if other["is"] == "swept"] != [chosen["num_stages"]]
    assert swept["ratio"] >= 1
    assert swept["measured"] == pytest.approx(chosen["us"])


class FakeCase:
    """Runs at a speed that its knobs say; with ``wrong`` its result is not right, and with ``broken`` it fails.

    Its time is told by a clock of its own, ``now``, which nothing else on the machine moves.
    """

    family, what = "fakes", "a fake"

    def __init__(self) -> None:
        self.now = 0.0

    def chosen(self, machine: Machine) -> Knobs:
        return {"speed": 2, "size": 16, "wrong": 0, "broken": 0}

    def axes(self, chosen: Knobs) -> Axes:
        return [{"speed": (1, 2, 4), "wrong": (0, 1)}, {"broken": (1,)}, {"size": (8, 64)}]

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        return knobs["size"] < 64

    def patches(self, knobs: Knobs) -> Patches:
        return ()

    def work(self, device: torch.device, copies: Copies) -> Work:
        def call(knobs: Knobs) -> int:
            if knobs["broken"]:
                raise RuntimeError("launch failure")
            self.now += 0.02 / knobs["speed"] if not knobs["wrong"] else 0.001
            return knobs["wrong"]

        def right(got: int) -> None:
            assert not got, "off by one"

        return Work(lambda knobs: [lambda: call(knobs)], right, 1.0, 1.0)


def test_the_fastest_way_that_is_right_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCase()
    monkeypatch.setattr(tuning, "rounds", lambda place: [[fake]])
    monkeypatch.setattr(place, "time", SimpleNamespace(perf_counter=lambda: fake.now, monotonic=time.monotonic))
    monkeypatch.setattr(tuning, "compile_all", lambda *_: (1, {}))
    monkeypatch.setattr(tuning, "NUM_REHEARSED", 100)
    machine = Machine("card", "", "", 0, copy_bandwidth=1e9, fp8_flops=1e9)
    every, row, summary = tuning.measure(Place("torch", time.monotonic() + 60, machine))
    assert isinstance(every, Row)
    assert isinstance(row, Row)
    assert isinstance(summary, Row)
    assert row.ratio == pytest.approx(2)
    assert "speed 2 → 4" in row.note
    assert not row.is_met
    errors = [str(one["error"]) for one in row.details if "error" in one]
    assert any("launch failure" in error for error in errors)
    assert any("off by one" in error for error in errors)
    assert not any(one["size"] == 64 for one in row.details)
    assert summary.details[0]["knob"] == "speed"
    assert summary.details[0]["gain"] == pytest.approx(2)


def test_a_sweep_says_what_it_did_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "rounds", lambda place: [[FakeCase()]])
    machine = Machine("card", "", "", 0, copy_bandwidth=1e9, fp8_flops=1e9)
    hurried = Place("gpu", time.monotonic() + 1, machine)
    with pytest.raises(OutOfTimeError, match="0 of 1 cases; not reached: a fake"):
        list(tuning.measure(hurried))


def _row(what: str) -> Row:
    return Row(what, Goal(at_least=0.5), 2.0, "ms", 0.75, 1.5, "floor")


def _good(place: Place) -> Iterator[Outcome]:
    yield _row("first")
    yield _row("second")


def _failing(place: Place) -> Iterator[Outcome]:
    yield _row("first")
    raise ValueError("no such kernel")


def _dying(place: Place) -> Iterator[Outcome]:
    yield _row("first")
    os._exit(13)


def _crashing(place: Place) -> Iterator[Outcome]:
    yield _row("first")
    os.kill(os.getpid(), signal.SIGSEGV)


def _late(place: Place) -> Iterator[Outcome]:
    yield _row("first")
    raise OutOfTimeError("out of time after first")


def _outcomes(section: Any, seconds: float = 60) -> list[Outcome]:
    return list(run_isolated("some", section, Place("torch", time.monotonic() + seconds)))


@pytest.mark.parametrize(
    ("section", "error"),
    [
        (_failing, "no such kernel"),
        (_dying, "exit code 13"),
        (_crashing, "exit code -11"),
        (_late, "out of time after first"),
    ],
)
def test_a_section_that_fails_keeps_what_it_had(section: Any, error: str) -> None:
    row, failure = _outcomes(section)
    assert row == _row("first")
    assert isinstance(failure, Failure)
    assert error in failure.error
    assert (section is not _crashing) or "in _crashing" in failure.trace
    assert _outcomes(_good) == [_row("first"), _row("second")], "the next section runs"


def test_a_section_that_hangs_is_stopped_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.isolation.GRACE", 0.1)
    file = tmp_path / "pid"

    def hanging(place: Place) -> Iterator[Outcome]:
        file.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        yield _row("first")
        time.sleep(600)

    row, failure = _outcomes(hanging, seconds=1)
    assert row == _row("first")
    assert isinstance(failure, Failure)
    assert "did not end in its time" in failure.error
    assert "in hanging" in failure.trace
    deadline = time.monotonic() + 10
    while _is_alive(int(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_servers_that_are_not_ready_in_time_leave_what_they_logged() -> None:
    """Also where something that they started goes on."""
    code = "import subprocess, time; print('no such kernel', flush=True); subprocess.run(['sleep', '600'])"

    def waiting(place: Place) -> Iterator[Outcome]:
        yield _row("first")
        draft.run([sys.executable, "-c", code], time.monotonic() + 2)

    row, failure = _outcomes(waiting, seconds=30)
    assert row == _row("first")
    assert isinstance(failure, Failure)
    assert "out of time in -c" in failure.error
    assert failure.error.endswith("no such kernel\n")


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_all_sections_together_take_ten_minutes_at_most() -> None:
    assert TOTAL < 600
    assert sum(SECTIONS.values()) <= TOTAL
    assert SECTIONS["machine"] + max(ASKED_FOR.values()) <= TOTAL


def test_the_floor_of_a_step_is_what_the_shapes_say() -> None:
    assert step_bytes(AIR, 1) == pytest.approx(13.4e9, rel=0.02)
    assert step_bytes(AIR, 1) / 4.3e12 == pytest.approx(3.1e-3, rel=0.02)
    for batch, milliseconds, best in ((1, 3.1, 1.17), (4, 6.9, 1.16), (16, 16.6, 1.88), (64, 24.5, 2.69)):
        assert 1e3 * step_bytes(AIR, batch) / 4.3e12 == pytest.approx(milliseconds, rel=0.03)
        assert best_ratio(AIR, batch, 3, 3.0, BF16) == pytest.approx(best, rel=0.03)
    saved = best_ratio(AIR, 1, 3, 3.0, FP8) / best_ratio(AIR, 1, 3, 3.0, BF16)
    assert saved == pytest.approx(1.06, rel=0.01), "a head of half the bytes, read three times in a cycle of 8 ms"


def test_as_many_layers_are_measured_as_a_card_holds() -> None:
    fits = {size: layers_that_fit(AIR, int(0.9 * size * 2**30), 64 * 512) for size in (24, 79, 139, 178)}
    assert fits[139] == fits[178] == 46
    assert 20 < fits[79] < 32
    assert 2 <= fits[24] < 7


def test_idle_is_what_no_interval_covers() -> None:
    assert idle_share([(0, 1), (1, 2)]) == 0
    assert idle_share([(3, 4), (0, 1)]) == pytest.approx(0.5)
    assert idle_share([(0, 3), (1, 2), (4, 5)]) == pytest.approx(0.2)


def test_pinned_acceptance_keeps_two_drafts_or_a_shorter_chain() -> None:
    drafts = torch.tensor([[5, 6, 7], [5, 6, 7], [5, NO_TOKEN, NO_TOKEN]])
    tokens = torch.tensor([[9, -1, -1, -1], [5, 6, 7, 8], [4, -1, -1, -1]])
    num, chain = pinned(torch.tensor([0, 3, 0]), tokens, drafts)
    assert num.tolist() == [2, 2, 1]
    assert chain.tolist() == [[5, 6, 9, -1], [5, 6, 8, -1], [5, 4, -1, -1]]


def test_sides_take_turns_in_graphs_that_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where starting a graph costs three microseconds, a call of ten is not taken for more than that."""
    replayed: list[int] = []

    def replay(graph: list[Any], repeats: int) -> float:
        replayed.append(len(graph))
        return 3e-6 + sum(call() for call in graph)

    monkeypatch.setattr(place, "_recorded", list)
    monkeypatch.setattr(place, "replayed", replay)
    sides = [[lambda: 10e-6] * 4, [lambda: 25e-6], [lambda: 2e-3]]
    found = Place("gpu", 0).seconds_side_by_side(sides)
    assert found == pytest.approx([10e-6, 25e-6, 2e-3], rel=0.005)
    lengths = replayed[-3 * place.REPEATS :]
    assert lengths[:3] * place.REPEATS == lengths
    assert lengths[2] == 1


def test_rivals_that_a_card_does_not_have_are_left_out() -> None:
    def missing(x: int) -> int:
        raise RuntimeError(f"not built for {x}")

    assert place.those_that_run([missing, abs, missing, float], 3) == [abs, float]
    with pytest.raises(RuntimeError, match="not built for 3"):
        place.those_that_run([missing, missing], 3)


def test_a_test_that_needs_a_gpu_does_not_pass_without() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="torch finds no GPU"):
        run("tests/kernels/test_triton_sampling.py", "test_draws_equal_torchs")


def test_a_wrong_element_or_an_unwritten_one_fails_the_check() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    check(exact.bfloat16(), exact, 0.05, "rounded")
    wrong = exact.bfloat16()
    wrong[3, 5] += 0.5
    with pytest.raises(AssertionError, match="off by"):
        check(wrong, exact, 0.05, "wrong")
    wrong[3, 5] = float("nan")
    with pytest.raises(AssertionError, match="not written"):
        check(wrong, exact, 0.05, "unwritten")


def test_goals_bound_ratios_from_either_side() -> None:
    assert Goal(at_least=0.75).is_met_by(0.75)
    assert not Goal(at_most=1.3).is_met_by(1.31)
    assert not Goal(0.95, 1.05).is_met_by(0.9)
    assert cells(_row("some"))[1:6] == ("≥ 0.5", "2 ms", "1.5 ms, floor", "0.75", "yes")
    assert "| NO |" in as_markdown("", {"some": [Row("slow", Goal(at_least=1), 1, "ms", 0.5)]}, is_rehearsal=False)


def test_failed_and_skipped_tests_are_counted() -> None:
    report = ElementTree.fromstring(
        "<testsuites><testsuite time='2.5'><testcase name='a'/><testcase name='b'><skipped/></testcase>"
        "<testcase name='c'><failure message='off by 3'/></testcase><testcase name='d'><error message='no'/></testcase>"
        "</testsuite></testsuites>"
    )
    row = row_of("tests/some.py", [report])
    assert (row.measured, row.ratio, row.is_met) == (1, 2, False)
    assert "c, d" in row.note


def test_tests_of_kernels_and_of_the_gpu_are_found() -> None:
    found = functions_of_gpu()
    assert "test_a_replayed_step_sees_new_requests" in found["tests/gpu/test_on_gpu.py"]
    assert "test_a_memory_plan_adds_up" not in found["tests/gpu/test_on_gpu.py"]
    assert "test_per_block" in found["tests/kernels/test_triton_matmul.py"]
    assert "tests/kernels/test_fp8.py" not in found
