"""Whatever the schema allows or forbids: no 5xx, and every failure in the contract's form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nextn.text.tokenizer import Tokenizer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.server.conftest import App, run_app
from tests.server.fake_engine import VOCAB_SIZE, Behaviour
from tests.server.test_errors import check_error


@pytest.fixture(scope="module")
def fuzzed(model_path: Path, tokenizer: Tokenizer) -> Iterator[App]:
    with run_app(model_path, tokenizer, Behaviour(step_seconds=0.0), ()) as running:
        yield running


ENDPOINTS = [
    ("GET", "/flush_cache"),
    ("GET", "/get_load"),
    ("GET", "/get_model_info"),
    ("GET", "/get_server_info"),
    ("GET", "/health"),
    ("GET", "/health_generate"),
    ("GET", "/metrics"),
    ("GET", "/model_info"),
    ("GET", "/server_info"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("POST", "/abort_request"),
    ("POST", "/detokenize"),
    ("POST", "/flush_cache"),
    ("POST", "/generate"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
]


POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    (method, path, mode)
    for method, path in ENDPOINTS
    for mode in ((POSITIVE, NEGATIVE) if method == "POST" and path != "/flush_cache" else (POSITIVE,))
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_input_makes_a_server_error(fuzzed: App, method: str, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")[path][method]
    num_examples = 40 if method == "POST" else 4

    @settings(max_examples=num_examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        response = case.call(timeout=20)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            headers = {"content-type": response.headers["content-type"][0]}
            plain = httpx.Response(response.status_code, headers=headers, content=response.content)
            check_error(plain, response.status_code, plain.json()["error"]["param"])

    send()


SAMPLING = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 5000),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1).map(str), st.floats(-100, 100), max_size=5),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1, max_size=5), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "n": st.integers(1, 3),
}
SHARED = {"stream": st.booleans(), "priority": st.integers(-5, 5), "cache_salt": st.text(max_size=9)}
TOKEN_IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
TEXT = st.text(min_size=1, max_size=30)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant"]), "content": TEXT}, optional={"name": TEXT}
)


def some_of(fields: dict[str, Any]) -> Any:
    """Any subset of the fields, each with a valid value or null."""
    return st.fixed_dictionaries({}, optional={name: values | st.none() for name, values in fields.items()})


BODIES = {
    "/v1/completions": st.builds(
        lambda prompt, rest: {"max_tokens": 5, **rest, "prompt": prompt},
        TEXT | TOKEN_IDS | st.lists(TEXT, min_size=1, max_size=3) | st.lists(TOKEN_IDS, min_size=1, max_size=3),
        some_of({**SAMPLING, **SHARED, "echo": st.booleans(), "logprobs": st.integers(0, 3)}),
    ),
    "/v1/chat/completions": st.builds(
        lambda messages, rest: {"max_tokens": 5, **rest, "messages": messages},
        st.lists(MESSAGE, min_size=1, max_size=3),
        some_of({**SAMPLING, **SHARED, "logprobs": st.booleans(), "separate_reasoning": st.booleans()}),
    ),
    "/generate": st.builds(
        lambda ids, params, rest: {**rest, "input_ids": ids, "sampling_params": {"max_new_tokens": 5, **params}},
        TOKEN_IDS,
        some_of(SAMPLING),
        some_of({**SHARED, "return_logprob": st.booleans(), "logprob_start_len": st.integers(-1, 40)}),
    ),
}


@pytest.mark.parametrize("path", BODIES)
def test_every_request_within_the_stated_limits_is_answered(fuzzed: App, path: str) -> None:
    with fuzzed.http as client:

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(body=BODIES[path])
        def send(body: dict[str, Any]) -> None:
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            assert ("[DONE]" in response.text[-20:]) == bool(body.get("stream"))

        send()


def test_the_schema_covers_every_endpoint(fuzzed: App) -> None:
    paths = fuzzed.http.get("/openapi.json").json()["paths"]
    served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert served == set(ENDPOINTS)
