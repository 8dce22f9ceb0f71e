"""The benchmark scripts run as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from nextn.llm import LLM

from benchmarks.common import prompts

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "parser(__doc__)" in path.read_text())


def run(script: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{script}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=900).stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script: str) -> None:
    text = run(script, "--help")
    assert "--quick" in text
    assert "--json" in text


def test_as_many_streams_run_as_the_table_says() -> None:
    llm = LLM(speculative_num_steps=0)
    for num in (1, 16, 64):
        found = prompts(llm.tokenizer, num)
        assert len(found) == num
        assert len(set(map(tuple, found))) == num


def test_a_shared_prefix_makes_later_first_tokens_at_least_five_times_faster(tmp_path: Path) -> None:
    table = run("prefix_cache", "--quick", "--json", str(tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "later / first" in table
    assert all(row["later / first"] <= 0.2 for row in rows)
    assert all(row["cached tokens"] >= 1500 - 16 for row in rows)


def test_a_lost_quantization_config_drafts_garbage_and_a_kept_one_does_not(tmp_path: Path) -> None:
    files = tmp_path / "out.json", tmp_path / "out.png"
    run("draft_quant", "--num-prompts", "4", "--rounds", "1", "--json", str(files[0]), "--plot", str(files[1]))
    rows = json.loads(files[0].read_text())["rows"]
    accept_length = {(row["streams"], row["draft"]): row["accept length"] for row in rows}
    assert {streams for streams, _ in accept_length} == {1, 8, 16}
    for streams in (1, 8, 16):
        assert accept_length[streams, "dropped"] < 1.5
        assert accept_length[streams, "kept"] >= 2.4
        assert accept_length[streams, "unquant"] == pytest.approx(accept_length[streams, "kept"], rel=0.05)
        assert accept_length[streams, "off"] == 1
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_a_broken_draft_is_noticed_and_the_model_as_it_is_raises_no_alarm(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    faults = ("none", "no-scales", "swapped-concat", "accept-all", "norm-twice")
    run("draft_mutants", "--quick", "--json", str(file), "--only", *faults)
    rows = {row["fault"]: row for row in json.loads(file.read_text())["rows"]}
    stages = ("load", "canary", "monitor", "shadow")
    noticed = {fault: [stage for stage in stages if row[stage]] for fault, row in rows.items()}
    assert noticed["none"] == []
    assert noticed["no-scales"] == ["load"]
    assert noticed["swapped-concat"] == ["canary", "monitor"]
    assert "shadow" in noticed["accept-all"]
    said = {fault: row["noticed"] for fault, row in rows.items()}
    assert said == dict.fromkeys(faults[1:4], "yes") | {"none": "no", "norm-twice": "not known"}, (
        "the tests did not run"
    )
