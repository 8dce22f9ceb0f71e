"""The doctor as a person and a machine run it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn import doctor
from nextn.checkpoint.plan import make_plan
from nextn.config.engine_config import EngineConfig
from nextn.config.server_args import ServerArgs
from nextn.diagnosis.checkup import GB, Diagnosis, examine
from nextn.diagnosis.memory import RESERVED_SHARE, memory_by_tp
from nextn.diagnosis.options import DoctorOptions
from nextn.diagnosis.pitfalls import find_pitfalls

from tests.checkpoints import Draft, Quant, State, tiny_config, write_checkpoint

CONFIG = tiny_config()
LAST = "model.layers.3"


def examined(folder: Path, *, deep: bool = False, **server: str) -> Diagnosis:
    return examine(DoctorOptions(str(folder), server, deep))


def pitfalls(folder: Path, **server: str) -> set[str]:
    return {pitfall.name for pitfall in examined(folder, **server).pitfalls}


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nextn.doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[1]), **environ},
    )


def test_the_embedded_model_is_well() -> None:
    told = run("--deep")
    assert told.returncode == 0, told.stderr
    for text in (
        "✓ serves",
        "✓ drafts",
        "detected in config.json, group_0",
        "To serve it",
        "headers and values",
    ):
        assert text in told.stdout
    assert "\x1b[" not in told.stdout, "no colour where the output is no terminal"


def test_colour_can_be_forced() -> None:
    assert "\x1b[" in run(FORCE_COLOR="1", TERM="xterm-256color").stdout


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"quant": "channel"}, 0, "✓ drafts"),
        ({"quant": "channel", "draft": "absent"}, 2, "It serves without drafts: --speculative-algorithm none"),
    ],
)
def test_exit_codes_and_words(options: dict[str, Any], code: int, text: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, **options)
    told = run(str(folder))
    assert (told.returncode, told.stderr) == (code, "")
    assert text in told.stdout


def test_without_a_nextn_layer_it_serves_but_does_not_draft(tmp_path: Path) -> None:
    found = examined(write_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=0)))
    assert (found.exit_code, found.serves, found.drafts) == (1, True, False)
    assert "num_nextn_predict_layers 0" in found.concerns[0]


def test_a_layer_that_config_json_does_not_name_is_pointed_at(tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        config["num_nextn_predict_layers"] = 0

    folder = write_checkpoint(tmp_path, CONFIG, mutate_config=forget)
    found = examined(folder)
    assert found.exit_code == 1
    assert "set it to 1" in found.warnings[0]
    assert "NextN layer not named" in pitfalls(folder)


def test_a_draft_that_was_never_trained_is_seen_in_its_norms(tmp_path: Path) -> None:
    def untrained(state: State) -> None:
        for name in state:
            if name.startswith(LAST) and name.endswith("norm.weight"):
                state[name] = torch.ones_like(state[name])

    folder = write_checkpoint(tmp_path, CONFIG, mutate=untrained)
    assert examined(folder).exit_code == 0
    found = examined(folder, deep=True)
    assert (found.exit_code, found.drafts) == (1, True)
    assert "exactly 1" in found.concerns[0]


PRECISIONS: dict[str, tuple[Quant, Draft, str | None, str]] = {
    "channel": ("channel", "same", None, "FP8, a scale per output channel"),
    "tensor": ("tensor", "same", None, "FP8, a scale per tensor"),
    "block": ("block", "same", None, "FP8, a scale per block"),
    "BF16": ("none", "same", None, "unquantized"),
    "BF16 draft": ("channel", "bf16_no_scales", None, "unquantized"),
    "unquant": ("channel", "same", "unquant", "unquantized, expanded from FP8 on load"),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_it_says_in_which_precision_it_will_draft(name: str, tmp_path: Path) -> None:
    quant, draft, override, precision = PRECISIONS[name]
    server = {"speculative_draft_model_quantization": override} if override else {}
    found = examined(write_checkpoint(tmp_path, CONFIG, quant=quant, draft=draft), **server)
    assert found.precision == precision
    assert found.reason


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    told = run(str(write_checkpoint(tmp_path, CONFIG, quant="channel")), "--json")
    found = json.loads(told.stdout)
    assert (found["exit_code"], found["serves"], found["drafts"]) == (0, True, True)
    assert found["report"]["draft_reason"] == "compressed-tensors, as detected"
    assert [one["tp_size"] for one in found["memory"]] == [1, 2, 4, 8, 16]
    assert {"name", "because", "elsewhere", "here"} == set(found["pitfalls"][0])
    refused = run(str(tmp_path / "nowhere"), "--json")
    assert (refused.returncode, json.loads(refused.stdout)["exit_code"]) == (2, 2)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    assert run("--plot", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = run("--plot", str(tmp_path / "no folder" / "memory.png"))
    assert told.returncode == 2
    assert "--plot" in told.stderr


def test_torch_is_not_imported() -> None:
    code = "import sys, nextn.doctor as d; d.main(['--deep', '--json']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative-algorithm", "none"],
        ["--speculative-draft-model-quantization", "unquant"],
        ["--quantization", "compressed-tensors"],
        [],
    ],
)
def test_the_command_is_one_that_the_server_takes(arguments: list[str], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a folder", CONFIG, quant="channel")
    found = json.loads(run(str(folder), "--json", *arguments).stdout)
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "-m", "nextn.launch_server"]
    args = ServerArgs.from_cli(words[3:], {})
    assert args.model_path == str(folder)
    assert words[5:] == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "CHECKPOINT /no/such/folder: there is no such folder"),
        (["a\x01b/../c"], "there is no such folder"),
        (["x" * 5000], "cannot be read"),
        (["--quantization", "int3"], "--quantization: found 'int3'"),
        (["--speculative-algorithm", "MEDUSA"], "--speculative-algorithm: found 'MEDUSA'"),
        (["--speculative-draft-model-path", "/nowhere"], "--speculative-draft-model-path /nowhere: there is no such"),
    ],
)
def test_bad_arguments_are_refusals_in_words(arguments: list[str], message: str) -> None:
    told = run(*arguments)
    assert told.returncode == 2
    assert message in told.stdout.replace("\n", "")
    assert "Traceback" not in told.stdout + told.stderr


@pytest.mark.parametrize("arguments", [["--gpu-memory", "none"], ["--gpu-memory", "-1"], ["--tp"], ["a", "b"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    told = run(*arguments)
    assert told.returncode == 2
    assert "usage:" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file" in (examined(tmp_path / "model.gguf").refusal or "")


def test_pitfalls_are_those_of_the_layout(tmp_path: Path) -> None:
    def case(name: str, **options: Any) -> Path:
        return write_checkpoint(tmp_path / name, CONFIG, **options)

    fp8 = case("fp8", quant="channel")
    assert {"draft config dropped", "ignore list not matched", "random head or embedding"} <= pitfalls(fp8)
    named = pitfalls(fp8, speculative_draft_model_quantization="compressed-tensors")
    assert "draft config dropped" not in named
    assert "unquant does nothing" in pitfalls(fp8, speculative_draft_model_quantization="unquant")
    mixed = pitfalls(case("mixed", quant="channel", draft="bf16_ignored"))
    assert "target's FP8 forced on the draft" in mixed
    assert "draft config dropped" not in mixed
    plain = pitfalls(case("plain", own_head=True, own_embedding=True))
    assert plain == {"router bias rounded"}
    assert "file outside the index" in pitfalls(case("unlisted", in_index=False))
    donor = pitfalls(case("target"), speculative_draft_model_path=str(fp8))
    assert "layer of another model" in donor


def test_a_quantized_eh_proj_is_served_and_pointed_at(tmp_path: Path) -> None:
    """The tensors decide: block FP8 has no list that names eh_proj, so both kinds of files exist."""

    def quantize(state: State) -> None:
        weight = state[f"{LAST}.eh_proj.weight"].float()
        state[f"{LAST}.eh_proj.weight"] = (weight * 100).to(torch.float8_e4m3fn)
        state[f"{LAST}.eh_proj.weight_scale_inv"] = torch.full((3, 6), 0.01)

    folder = write_checkpoint(tmp_path, CONFIG, quant="block", mutate=quantize)
    assert examined(folder, deep=True).serves
    assert "eh_proj read raw" in pitfalls(folder)


def test_blocks_cut_by_tensor_parallelism_are_named(tmp_path: Path) -> None:
    """Blocks of 16: 80 is five of them, 24 one and a half."""
    folder = write_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=1), quant="block")
    plan = make_plan(EngineConfig(model_path=str(folder)), want_draft=True)
    memory = memory_by_tp(plan, GB, page_size=16)
    by_size = {one.tp_size: one for one in memory}
    assert by_size[1].uneven == ()
    assert "80/2 in blocks of 16 is 32 to 48 (mlp.gate_up_proj, mlp.down_proj)" in by_size[2].uneven
    assert any("24/2 in blocks of 16 is 8 to 16 (experts.w13, experts.w2" in text for text in by_size[2].uneven)
    assert by_size[4].why_not is not None
    assert "24 has 2 pieces of 16 (experts.w13, experts.w2" in by_size[4].why_not
    assert by_size[8].why_not == "4 heads do not divide by 8"
    assert "blocks cut by tensor parallelism" in {pitfall.name for pitfall in find_pitfalls(plan, memory)}


def test_what_fits_has_room_for_the_pages_that_a_server_needs_to_start(tmp_path: Path) -> None:
    """Two of 16 tokens; with less than the model's 512, it says how long a request may be."""
    folder = write_checkpoint(tmp_path, CONFIG)
    whole = examine(DoctorOptions(str(folder), {})).memory[0]
    found, told = {}, {}
    for num_tokens in (31, 32, 300, 513):
        gpu_gb = (whole.weight_bytes + (num_tokens + 0.5) * whole.kv_bytes_per_token) / (1 - RESERVED_SHARE) / GB
        one = examine(DoctorOptions(str(folder), {}, gpu_gb=gpu_gb)).memory[0]
        found[num_tokens] = (one.fits, one.kv_tokens, one.context_length)
        told[num_tokens] = run(str(folder), "--gpu-memory", repr(gpu_gb)).stdout
    assert found == {31: (False, 0, 0), 32: (True, 32, 32), 300: (True, 300, 288), 513: (True, 513, 512)}
    assert "  1 GPU: room for requests of 288 tokens, of the model's 512" in told[300]
    assert "  1 GPU:" not in told[513]


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    def add_code(config: dict[str, Any]) -> None:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}

    folder = write_checkpoint(tmp_path / "model", CONFIG, mutate_config=add_code)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    assert examined(folder, deep=True).exit_code == 0
    assert not (tmp_path / "marker").exists()


WEIRD: list[Any] = [None, True, -1, 0, 1e400, 10**30, "", "x", [], [1], [[]], {}, {"a": 1}, [None], "\ud800"]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in items for deeper in _paths(item, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("quant", ["channel", "block"])
def test_nothing_that_a_config_can_say_breaks_the_doctor(quant: Quant, tmp_path: Path) -> None:
    """Every field of config.json, at any depth, replaced by every kind of nonsense."""
    folder = write_checkpoint(tmp_path, {**CONFIG, "rope_parameters": {"rope_theta": 1.0}}, quant=quant)
    config = json.loads((folder / "config.json").read_text())
    for path in _paths(config):
        for new in WEIRD:
            (folder / "config.json").write_text(json.dumps(_replaced(config, path, new)))
            found = examined(folder, deep=True)
            assert found.exit_code in (0, 1, 2), (path, new)
            json.dumps(found.as_dict())


def test_nothing_that_a_header_or_an_index_can_say_breaks_the_doctor(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIG, quant="tensor")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for new in WEIRD:
        for path in ((), ("weight_map",), ("weight_map", "lm_head.weight")):
            index.write_text(json.dumps(_replaced(listed, path, new)))
            assert examined(folder, deep=True).exit_code in (0, 2)
    index.unlink()
    file = folder / "mtp.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = f"{LAST}.enorm.weight"
    for path in ((), (name,), (name, "dtype"), (name, "shape"), (name, "shape", 0), (name, "data_offsets", 0)):
        for new in WEIRD:
            text = json.dumps(_replaced(header, path, new)).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
            assert examined(folder, deep=True).exit_code in (0, 2), (path, new)
    for nested in ("[" * 100_000, '{"a":' * 50_000):
        file.write_bytes(len(nested).to_bytes(8, "little") + nested.encode())
        assert examined(folder).exit_code == 2
        (folder / "config.json").write_text(nested)
        assert examined(folder).exit_code == 2


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIG)
    (folder / "extra.safetensors").symlink_to("gone")
    assert "extra.safetensors" in (examined(folder).refusal or "")
    (folder / "extra.safetensors").unlink()
    (folder / "extra.safetensors").mkdir()
    assert "extra.safetensors" in (examined(folder).refusal or "")
    shutil.rmtree(folder / "extra.safetensors")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json cannot be read" in (examined(folder).refusal or "")


@pytest.mark.parametrize(
    "environ",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},  # the port of discard, where nothing listens
        {"HF_ENDPOINT": "no-url"},
    ],
    ids=["offline", "no connection", "no URL"],
)
@pytest.mark.parametrize("arguments", [(), ("--deep",)])
def test_an_unreachable_hub_is_a_refusal(arguments: tuple[str, ...], environ: dict[str, str], tmp_path: Path) -> None:
    told = run("owner/name", *arguments, HF_HOME=str(tmp_path), **environ)
    assert told.returncode == 2
    assert "CHECKPOINT owner/name: no such folder, not in the local cache" in told.stdout
    assert "itself failed" not in told.stderr
    assert "Traceback" not in told.stdout + told.stderr
