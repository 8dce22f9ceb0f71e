"""Whole runs against a server whose counts and timing are known."""

import json
from pathlib import Path
from typing import Any

import pytest
from nextn.bench_serving import main

from tests.bench.conftest import GAP, FakeServer


def run(server: FakeServer, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "out.jsonl"
    base = ["--base-url", server.url, "--disable-tqdm", "--output-file", str(out), "--num-prompts", "4"]
    base += ["--random-input-len", "7", "--random-output-len", "10", "--ready-check-timeout", "5"]
    code = main([*base, *flags])
    return code, json.loads(out.read_text().splitlines()[-1]) if out.exists() else {}


@pytest.mark.parametrize("backend", ["nextn", "sglang", "openai", "vllm", "openai-chat", "vllm-chat"])
def test_the_figures_are_what_was_sent(backend: str, server: FakeServer, tmp_path: Path, tokenizer_path: str) -> None:
    flags = ["--backend", backend, "--dataset-name", "random", "--tokenizer", tokenizer_path, "--output-details"]
    code, line = run(server, tmp_path, *flags)
    assert code == 0
    assert line["arguments"]["model"] == "known-model"
    assert (line["completed"], line["failed"]) == (4, 0)
    assert (line["total_input_tokens"], line["total_output_tokens"]) == (28, 40)
    assert [len(gaps) for gaps in line["itls"]] == [4] * 4
    # The lower bound is the server's sleep; the upper one leaves room for a busy machine.
    assert GAP * 1e3 * 0.95 <= line["median_itl_ms"] <= GAP * 1e3 * 4
    assert GAP * 1e3 * 0.95 <= line["median_ttft_ms"] <= GAP * 1e3 * 8
    assert line["accept_length"] == pytest.approx(2.0)
    assert line["generated_texts"] == ["é " * 10] * 4
    if backend in ("nextn", "sglang"):
        assert line["mean_itl_per_token_ms"] == pytest.approx(line["mean_itl_ms"] / 2)
        assert line["chunk_tokens"] == [[2] * 5] * 4


def test_failures_are_counted_by_reason(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.mode = "every-other"
    code, line = run(server, tmp_path, "--dataset-name", "random-ids", "--warmup-requests", "0")
    assert code == 0
    assert (line["completed"], line["failed"]) == (2, 2)
    assert line["errors"] == {"HTTP 429: queue full": 2}
    assert "2 x HTTP 429: queue full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("error-event", "engine died"), ("cut", "the stream ended before [DONE]"), ("fail", "HTTP 429: queue full")],
)
def test_a_broken_answer_is_a_failure(mode: str, reason: str, server: FakeServer, tmp_path: Path) -> None:
    server.mode = mode
    code, line = run(server, tmp_path, "--dataset-name", "random-ids", "--warmup-requests", "0")
    assert code == 1
    assert line["errors"] == {reason: 4}


@pytest.mark.parametrize("backend", ["nextn", "openai", "openai-chat"])
@pytest.mark.parametrize(
    "event",
    [
        '{"meta_info": 5, "usage": 5}',
        '{"text": 5, "choices": [{"text": 5}]}',
        '{"meta_info": {"completion_tokens": "9"}, "usage": {"completion_tokens": "9"}}',
        '{"meta_info": "x", "choices": [null]}',
        '{"text": "\xff", "choices": [{"text": "\xff"}]}',
        '{"meta_info": [1], "choices": [{"delta": {"tool_calls": [5]}}]}',
    ],
)
def test_an_answer_of_the_wrong_form_is_a_failure_of_its_request_alone(
    backend: str, event: str, server: FakeServer, tmp_path: Path, tokenizer_path: str
) -> None:
    server.mode = event
    flags = ["--backend", backend, "--tokenizer", tokenizer_path, "--warmup-requests", "0"]
    code, line = run(server, tmp_path, *flags)
    assert code == 1
    assert list(line["errors"].values()) == [4]
    assert "Error" in next(iter(line["errors"]))


def test_without_streaming_only_end_to_end_is_measured(server: FakeServer, tmp_path: Path) -> None:
    code, line = run(server, tmp_path, "--dataset-name", "random-ids", "--disable-stream")
    assert code == 0
    assert line["total_output_tokens"] == 40
    assert line["mean_ttft_ms"] is None
    assert line["mean_e2e_latency_ms"] > 0


def test_concurrency_is_bounded_and_warm_up_is_excluded(server: FakeServer, tmp_path: Path) -> None:
    flags = ["--dataset-name", "random-ids", "--max-concurrency", "1", "--warmup-requests", "2"]
    _, line = run(server, tmp_path, *flags)
    assert line["completed"] == 4
    assert len(server.bodies) == 6
    assert line["concurrency"] <= 1.0


def test_the_extra_body_is_merged(server: FakeServer, tmp_path: Path) -> None:
    extra = '{"sampling_params": {"temperature": 0.5}, "rid": "x"}'
    run(server, tmp_path, "--dataset-name", "random-ids", "--extra-request-body", extra)
    body = server.bodies[-1]
    assert body["rid"] == "x"
    assert body["sampling_params"] == {"temperature": 0.5, "max_new_tokens": 10, "ignore_eos": True}


def test_a_picture_and_a_comparison(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "run.png"
    run(server, tmp_path, "--dataset-name", "random-ids", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    a = tmp_path / "out.jsonl"
    record = json.loads(a.read_text())
    record["output_throughput"] *= 2
    record["arguments"]["seed"] = 9
    b = tmp_path / "b.jsonl"
    b.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert main(["--compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "--seed: A 1, B 9" in out
    assert next(row for row in out.splitlines() if row.startswith("output_throughput")).endswith("2.000")


def test_no_server_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--ready-check-timeout", "0"]) == 1
    assert "was not ready" in capsys.readouterr().err


def test_an_unknown_choice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--backend", "tgi"])
    assert "tgi" in capsys.readouterr().err
