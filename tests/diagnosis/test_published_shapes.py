"""Checkpoints of 107 and 355 billion parameters, as headers over holes: seconds, and little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nextn import doctor
from nextn.diagnosis.checkup import Diagnosis, examine
from nextn.diagnosis.memory import PARTS
from nextn.diagnosis.options import DoctorOptions

from tests.headers import published_config, write_headers

GB = 10**9


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """4.5 and Air ship the NextN layer's own head and embedding; 4.6 neither."""
    folder = tmp_path_factory.mktemp("published")
    cases = [("glm-4.6", "channel"), ("glm-4.6", "block"), ("glm-4.5-air", "none"), ("glm-4.5-air", "block")]
    return {
        f"{name} {quant}": write_headers(
            folder / f"{name}-{quant}",
            published_config(name, quant),
            own_head=name != "glm-4.6",
            own_embedding=name != "glm-4.6",
        )
        for name, quant in cases
    }


def examined(folder: Path, **options: Any) -> Diagnosis:
    found = examine(DoctorOptions(str(folder), {}, **options))
    assert found.exit_code == 0, found.refusal
    assert found.model is not None
    return found


def test_355_billion_parameters_take_seconds_and_little_memory(checkpoints: dict[str, Path]) -> None:
    """In a process of its own, so that its peak is its own. Measured on 2 cores: 2.5 s, 120 MB.

    VmHWM, not ru_maxrss: Linux hands the parent's peak down through fork and exec in the latter.
    """
    folder = checkpoints["glm-4.6 channel"]
    on_disk = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    assert on_disk < 100 * 2**20, "the files are holes"
    code = (
        "import pathlib, re, sys, nextn.doctor as d; code = d.main(sys.argv[1:]);"
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1], file=sys.stderr); sys.exit(code)"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(folder), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert told.returncode == 0, told.stderr
    assert int(told.stderr.split()[-1]) * 1024 < 0.5 * 2**30
    assert json.loads(told.stdout)["drafts"]


def test_parameters_and_bytes_are_those_of_the_published_model(checkpoints: dict[str, Path]) -> None:
    model = examined(checkpoints["glm-4.6 channel"]).model
    assert model is not None
    assert 352e9 < model.parameters < 353e9
    assert 3.9e9 < model.draft_parameters < 4.1e9
    air = examined(checkpoints["glm-4.5-air none"]).model
    assert air is not None
    assert 106e9 < air.parameters < 107e9
    assert air.stored_bytes == sum(
        int(file.stat().st_size) - 8 - int.from_bytes(file.open("rb").read(8), "little")
        for file in checkpoints["glm-4.5-air none"].glob("*.safetensors")
    ), "every byte of the files is accounted for"


@pytest.mark.parametrize("name", ["glm-4.6 channel", "glm-4.6 block", "glm-4.5-air none"])
def test_memory_adds_up(name: str, checkpoints: dict[str, Path]) -> None:
    found = examined(checkpoints[name])
    assert found.model is not None
    one = found.memory[0]
    head_for_drafts = 0 if name.endswith("none") else 151552 * (5120 + 4)
    assert one.weight_bytes == pytest.approx(found.model.stored_bytes + head_for_drafts, abs=len(PARTS))
    for cut in found.memory[1:]:
        if cut.why_not is not None:
            continue
        whole = sum(one.parts[part] for part in ("embedding and head", "norms and router"))  # on every GPU, in part
        least = found.model.stored_bytes / cut.tp_size
        blocks = 1.34 if cut.uneven else 1.1  # of twelve blocks, two for some of eight
        assert least <= cut.weight_bytes < least * blocks + 2 * whole
        assert cut.parts["experts"] == pytest.approx(one.parts["experts"] / cut.tp_size, rel=blocks - 1)


def test_kv_of_a_token_and_what_fits(checkpoints: dict[str, Path]) -> None:
    """93 layers (the draft's is one) x 2 x 8 heads x 128 x 2 bytes; from 8 GPUs on, one head per GPU."""
    found = examined(checkpoints["glm-4.6 channel"])
    by_size = {one.tp_size: one for one in found.memory}
    assert by_size[1].kv_bytes_per_token == 93 * 2 * 8 * 128 * 2 + 5120 * 2
    assert by_size[8].kv_bytes_per_token == 93 * 2 * 128 * 2 + 5120 * 2
    assert by_size[16].kv_bytes_per_token == 93 * 2 * 128 * 2 + 5120 * 2, "KV heads are repeated"
    assert [size for size, one in by_size.items() if one.fits] == [4, 8, 16]
    assert found.min_gpus == 4
    eight = by_size[8]
    assert eight.kv_tokens == int((141 * GB * 0.9 - eight.weight_bytes) // eight.kv_bytes_per_token)
    small = {one.tp_size: one.fits for one in examined(checkpoints["glm-4.6 channel"], gpu_gb=80.0).memory}
    assert [size for size, fits in small.items() if fits] == [8, 16]
    assert examined(checkpoints["glm-4.6 block"], gpu_gb=80.0).min_gpus == 8, "of 12 blocks, two for some and one else"


def test_block_divisibility_of_the_published_sizes(checkpoints: dict[str, Path]) -> None:
    """1536 / 8 = 192 falls inside a block of 128; Air's 1408 = 11 x 128 cannot be cut even in two."""
    memory = {one.tp_size: one for one in examined(checkpoints["glm-4.6 block"]).memory}
    assert memory[1].uneven == memory[2].uneven == memory[4].uneven == ()
    assert any("1536/8 in blocks of 128 is 128 to 256 (experts.w13, experts.w2" in text for text in memory[8].uneven)
    assert "1536 has 12 pieces of 128 (experts.w13, experts.w2" in (memory[16].why_not or "")
    air = {one.tp_size: one.uneven for one in examined(checkpoints["glm-4.5-air block"]).memory}
    assert air[1] == ()
    assert any("1408/2 in blocks of 128 is 640 to 768 (experts" in text for text in air[2])
    assert "10944/2 in blocks of 128 is 5440 to 5504 (mlp.gate_up_proj, mlp.down_proj)" in air[2]


def test_an_official_ignore_list_is_accepted_and_reported(checkpoints: dict[str, Path]) -> None:
    report = examined(checkpoints["glm-4.6 channel"]).report
    assert report is not None
    rows = {m.kind: m for m in report.draft}
    assert rows["eh_proj"].source == "ignore entry 'model.layers.*.eh_proj'"
    assert (rows["experts.w13"].scheme, rows["experts.w13"].count) == ("fp8_channel", 160)
    assert rows["lm_head"].source.startswith("the target's")
    air = examined(checkpoints["glm-4.5-air none"]).report
    assert air is not None
    assert {m.kind: m.source for m in air.draft}["lm_head"] == "never quantized"


def test_holes_are_no_scales(checkpoints: dict[str, Path]) -> None:
    found = examine(DoctorOptions(str(checkpoints["glm-4.5-air block"]), {}, deep=True))
    assert found.exit_code == 2
