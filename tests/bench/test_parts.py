"""Datasets, the SSE parser and the arithmetic."""

import json
from pathlib import Path

import numpy as np
import pytest
from nextn.bench.backends import SSEParser
from nextn.bench.datasets import make_requests
from nextn.bench.errors import BenchError
from nextn.bench.metrics import accept_length, summarize, time_per_output_token, token_gaps
from nextn.bench.options import parse_options
from nextn.bench.runner import Run
from nextn.bench.server_info import SpecCounters
from nextn.bench.tokenizer import count_tokens, load_tokenizer
from nextn.bench.types import RequestResult


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_events_do_not_depend_on_how_bytes_are_split(size: int) -> None:
    data = 'data: {"a": "é"}\r\n\r\n: comment\n\ndata:x\ndata: y\n\ndata: [DONE]'.encode()
    parser = SSEParser()
    events = [e for i in range(0, len(data), size) for e in parser.feed(data[i : i + size])] + parser.close()
    assert events == ['{"a": "é"}'.encode(), b"x\ny", b"[DONE]"]


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(0).exponential(5, 137).tolist()
    got = summarize(values, (90, 99))
    assert got["p99"] == np.percentile(values, 99)
    assert (got["mean"], got["median"], got["max"]) == (np.mean(values), np.median(values), max(values))
    assert set(summarize([], (90,)).values()) == {None}


def test_tpot_and_gaps_of_several_tokens_per_chunk() -> None:
    result = RequestResult(0.0, 5, 1.0, True, completion_tokens=5, chunk_times=[0.1, 0.3, 0.5], chunk_tokens=[1, 2, 2])
    assert time_per_output_token(result) == pytest.approx(100.0)
    assert token_gaps(result) == pytest.approx([100.0] * 4)


def test_accept_length_from_counters_then_requests_then_average() -> None:
    result = RequestResult(0.0, 5, 1.0, True, completion_tokens=30, spec_verify_ct=10)
    none = SpecCounters()
    assert accept_length(Run("m", [result], 0, 1, SpecCounters(10, 10), SpecCounters(20, 25))) == 2.5
    assert accept_length(Run("m", [result], 0, 1, none, none)) == 3.0
    result.spec_verify_ct = None
    assert accept_length(Run("m", [result], 0, 1, none, SpecCounters(average=1.7))) == 1.7
    assert accept_length(Run("m", [result], 0, 1, none, none)) is None


def test_random_text_has_exactly_the_length_and_is_seeded(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    options = parse_options(["--num-prompts", "8", "--random-input-len", "50", "--random-range-ratio", "0.2"])
    requests = make_requests(options, tokenizer, None)
    assert [count_tokens(tokenizer, r.text or "") for r in requests] == [r.prompt_len for r in requests]
    assert all(10 <= r.prompt_len <= 50 for r in requests)
    assert requests == make_requests(options, tokenizer, None)


def test_shared_prefixes_are_shared(tokenizer_path: str) -> None:
    flags = "--dataset-name generated-shared-prefix --gsp-num-groups 2 --gsp-prompts-per-group 3 "
    flags += "--gsp-system-prompt-len 20 --gsp-question-len 5"
    requests = make_requests(parse_options(flags.split()), load_tokenizer(tokenizer_path), None)
    assert len(requests) == 6
    prefixes = [(r.text or "")[:10] for r in requests]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [3, 3]
    assert all(24 <= r.prompt_len <= 30 for r in requests)


@pytest.mark.parametrize("jsonl", [False, True])
def test_sharegpt_reads_both_layouts(jsonl: bool, tokenizer_path: str, tmp_path: Path) -> None:
    rows = [{"conversations": [{"value": f"the fox {i}"}, {"value": "the dog"}]} for i in range(5)]
    file = tmp_path / "data"
    file.write_text("\n".join(map(json.dumps, rows)) if jsonl else json.dumps(rows))
    options = parse_options(["--dataset-name", "sharegpt", "--dataset-path", str(file), "--num-prompts", "3"])
    tokenizer = load_tokenizer(tokenizer_path)
    requests = make_requests(options, tokenizer, None)
    assert len({r.text for r in requests}) == 3
    assert {r.output_len for r in requests} == {count_tokens(tokenizer, "the dog")}


def test_what_is_missing_is_named(tokenizer_path: str) -> None:
    with pytest.raises(BenchError, match="needs --dataset-path"):
        make_requests(parse_options(["--dataset-name", "sharegpt"]), None, None)
    with pytest.raises(BenchError, match="--tokenizer FOLDER"):
        make_requests(parse_options(["--dataset-name", "random"]), None, None)
    options = parse_options(["--dataset-name", "random", "--dataset-path", "/nowhere.json"])
    with pytest.raises(BenchError, match="no such file"):
        make_requests(options, load_tokenizer(tokenizer_path), None)


@pytest.mark.parametrize(
    "content", [b"[5]", b'[{"conversations": [5, 6]}]', b'[{"messages": "ab"}]', b"\xff", b"{", b"[" * 9000]
)
def test_a_dataset_of_the_wrong_form_is_named(content: bytes, tokenizer_path: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(content)
    options = parse_options(["--dataset-name", "sharegpt", "--dataset-path", str(file)])
    with pytest.raises(BenchError, match=str(file)):
        make_requests(options, load_tokenizer(tokenizer_path), None)


@pytest.mark.parametrize(("flag", "value"), [("--seed", "-1"), ("--extra-request-body", '{"sampling_params": 5}')])
def test_a_wrong_value_is_named(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options([flag, value])
    assert flag in capsys.readouterr().err
