"""Whatever the schema allows or forbids: no 5xx, and every failure in the contract's form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from nextn.text.tokenizer import Tokenizer
from tests.server.conftest import App, run_app
from tests.server.fake_engine import Behaviour
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
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("POST", "/abort_request"),
    ("POST", "/detokenize"),
    ("POST", "/flush_cache"),
    ("POST", "/generate"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
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


def test_the_schema_covers_every_endpoint(fuzzed: App) -> None:
    paths = fuzzed.http.get("/openapi.json").json()["paths"]
    served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert served == set(ENDPOINTS)
