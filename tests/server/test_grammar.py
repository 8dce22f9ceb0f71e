"""Schemas, expressions and forced tool calls through the openai client, on the embedded model."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pytest
from nextn.errors import RequestError
from nextn.server import proving
from nextn.text.grammar import regex_form
from nextn.text.grammar_compiler import GrammarProver, UnknownGrammar
from pydantic import BaseModel, Field

from tests.server.conftest import App, AppFactory, wait_until
from tests.server.processes import Launched, launched
from tests.server.test_errors import check_error

PARSERS = ("--tool-call-parser", "glm45", "--reasoning-parser", "glm45")
HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "unit", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED_CLOCK = {"type": "function", "function": {"name": "get_time"}}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}


class City(BaseModel):
    """What the client asks for."""

    name: str = Field(max_length=20)
    continent: Literal["Europe", "Asia"]
    inhabitants: int = Field(ge=0, le=99)


CITY = {**City.model_json_schema(), "additionalProperties": False}


@pytest.fixture(scope="module")
def server() -> Iterator[Launched]:
    flags = ("--max-total-tokens", "32768", "--served-model-name", "demo", *PARSERS)
    with launched(*flags, module="nextn.launch_server") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(server: Launched) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=server.http)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_client_parses_an_answer_of_its_own_type(client: openai.OpenAI, temperature: float) -> None:
    completion = client.chat.completions.parse(
        model="demo", messages=HELLO, response_format=City, temperature=temperature, seed=1, max_tokens=300
    )
    choice = completion.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, City)
    assert "France" in choice.message.reasoning_content  # type: ignore[attr-defined]


def test_streamed_json_is_that_of_one_piece(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "demo",
        "messages": HELLO,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        "temperature": 0,
        "max_tokens": 300,
    }
    whole = client.chat.completions.create(**fields).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert jsonschema_rs.is_valid(CITY, json.loads(whole or ""))


def test_reasoning_that_is_not_set_apart_would_spoil_the_json(client: openai.OpenAI) -> None:
    message = (
        client.chat.completions.create(
            model="demo",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
            temperature=0,
            max_tokens=60,
            extra_body={"separate_reasoning": False},
        )
        .choices[0]
        .message
    )
    assert isinstance(json.loads(message.content or ""), int)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", [WEATHER, CLOCK]),
        ({"type": "function", "function": {"name": "get_weather"}}, [CLOCK, WEATHER]),
        ({"type": "function", "function": {"name": "get_time"}}, [CLOCK, WEATHER]),
        ({"type": "function", "name": "get_time"}, [WEATHER, CLOCK]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED_CLOCK]}}, [WEATHER, CLOCK]),
        ({"type": "allowed_tools", "mode": "required", "tools": [NAMED_CLOCK]}, [WEATHER, CLOCK]),
    ],
    ids=["any", "the second", "the first", "by name", "allowed", "allowed, flat"],
)
def test_a_call_can_be_forced(client: openai.OpenAI, choice: Any, tools: list[Any], stream: bool) -> None:
    fields: dict[str, Any] = {
        "model": "demo",
        "messages": HELLO,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
    }
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **fields)]
        calls = [call.function for chunk in chunks for call in chunk.delta.tool_calls or ()]
        name, arguments = calls[0].name, "".join(call.arguments or "" for call in calls)
        reason = chunks[-1].finish_reason
    else:
        answer = client.chat.completions.create(**fields).choices[0]
        (call,) = answer.message.tool_calls or []
        name, arguments, reason = call.function.name, call.function.arguments, answer.finish_reason
    assert reason == "tool_calls"
    wants_weather = choice == "required" or choice.get("function") == {"name": "get_weather"}
    assert name == ("get_weather" if wants_weather else "get_time")
    schema = WEATHER["function"]["parameters"] if name == "get_weather" else {"maxProperties": 0}
    assert jsonschema_rs.is_valid(schema, json.loads(arguments))


def test_a_strict_tool_is_called_by_its_schema_when_the_model_chooses(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "demo", "tools": [WEATHER], "temperature": 0, "max_tokens": 200}
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    (call,) = client.chat.completions.create(messages=asked, **fields).choices[0].message.tool_calls or []
    assert jsonschema_rs.is_valid(WEATHER["function"]["parameters"], json.loads(call.function.arguments))
    message = client.chat.completions.create(messages=HELLO, **fields).choices[0].message
    assert (message.content, message.tool_calls) == ("The capital of France is Paris.", None)


def test_every_endpoint_takes_expressions_and_grammars(server: Launched, client: openai.OpenAI) -> None:
    text = client.completions.create(
        model="demo", prompt="Once", max_tokens=40, extra_body={"regex": "[a-z]{3} [0-9]{2}"}
    )
    assert re.fullmatch("[a-z]{3} [0-9]{2}", text.choices[0].text)
    answer = server.http.post(
        "/generate",
        json={
            "text": ["Once", "Twice"],
            "sampling_params": [{"ebnf": 'root ::= "yes" | "no"'}, {"json_schema": '{"enum": [1, 2]}'}],
        },
    ).json()
    assert answer[0]["text"] in ("yes", "no")
    assert answer[1]["text"] in ("1", "2")
    assert [one["meta_info"]["finish_reason"]["type"] for one in answer] == ["stop", "stop"]


def test_choices_of_a_request_have_the_same_form(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="demo", prompt="Once", n=4, max_tokens=20, temperature=2, seed=3, extra_body={"regex": "[a-z]{2}"}
    )
    texts = [choice.text for choice in found.choices]
    assert all(re.fullmatch("[a-z]{2}", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("flags", "with_tokenizer"), [(("--grammar-backend", "none"), True), (("--skip-tokenizer-init",), False)]
)
def test_a_server_without_a_backend_says_so(make_app: AppFactory, flags: tuple[str, ...], with_tokenizer: bool) -> None:
    app = make_app(*flags, with_tokenizer=with_tokenizer)
    found = app.http.post("/generate", json={"input_ids": [5], "sampling_params": {"regex": "a"}})
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "unsupported_parameter"
    assert found.json()["error"]["param"] == "sampling_params.regex"
    assert f" {' '.join(flags)};" in found.json()["error"]["message"]


def test_a_request_that_asks_for_no_form_has_no_grammar(make_app: AppFactory) -> None:
    app = make_app()
    plain: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 2}
    for fields in (
        {},
        {"response_format": {"type": "text"}},
        {"tools": [CLOCK]},
        {"tools": [WEATHER], "tool_choice": "none"},
    ):
        app.openai.chat.completions.create(**plain, **fields)
    app.openai.chat.completions.create(**plain, response_format={"type": "json_object"})
    assert [request.grammar is None for request in app.added] == [True] * 4 + [False]


def completion(app: App, regex: str) -> httpx.Response:
    return app.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "regex": regex})


def test_grammars_that_wait_hold_up_nothing_else(make_app: AppFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "MAX_WAITING", 40)  # more than the loop's own threads
    monkeypatch.setattr(proving, "MAX_WAIT", 1000.0)
    app = make_app(fresh=True)
    assert completion(app, "known").status_code == 200
    compiling = app.services.prover._lock
    with ThreadPoolExecutor(41) as pool:
        compiling.acquire()
        try:
            waiting = [pool.submit(completion, app, f"a{{{i}}}") for i in range(1, 42)]
            wait_until(lambda: app.services.proving.num_waiting == 40)
            check_error(completion(app, "b"), 429, None, "queue_full")
            assert completion(app, "known").status_code == 200
            assert app.http.post("/tokenize", json={"prompt": "x" * 20_000}).status_code == 200
            chat = {"model": "demo", "messages": HELLO, "max_tokens": 2, "tools": [CLOCK]}
            assert app.http.post("/v1/chat/completions", json=chat).status_code == 200
        finally:
            compiling.release()
        assert {answer.result().status_code for answer in waiting} == {200}


def test_who_waits_too_long_for_a_grammar_is_told_to_come_again(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "MAX_WAIT", 0.01)
    app = make_app(fresh=True)
    with ThreadPoolExecutor(1) as pool:
        with app.services.prover._lock:
            first = pool.submit(completion, app, "a")
            wait_until(app.services.proving._turn.locked)
            check_error(completion(app, "b"), 429, None, "queue_full")
        assert first.result().status_code == 200


def test_a_grammar_whose_client_has_left_is_not_compiled(make_app: AppFactory) -> None:
    app = make_app(fresh=True)
    grammar = regex_form("left", "regex", str).as_grammar()
    body = json.dumps({"prompt": "x", "regex": "left"}).encode()
    with ThreadPoolExecutor(1) as pool:
        with app.services.prover._lock:
            first = pool.submit(completion, app, "a")
            wait_until(app.services.proving._turn.locked)
            with socket.create_connection(("127.0.0.1", httpx.URL(app.url).port or 0)) as client:
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
                client.sendall(body)
                wait_until(lambda: app.services.proving.num_waiting == 1)
            assert app.http.get("/v1/models").status_code == 200  # by now the server knows
        assert first.result().status_code == 200
    assert completion(app, "b").status_code == 200
    with pytest.raises(UnknownGrammar):
        app.services.check_grammar(grammar, at_once=True)


def test_a_grammar_that_is_slow_to_translate_holds_up_nothing_else(make_app: AppFactory) -> None:
    app = make_app(fresh=True)
    body = {"prompt": "x", "max_tokens": 1, "ebnf": "root ::= " + 60_000 * "\n"}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(app.http.post, "/v1/completions", json=body, timeout=300)
        wait_until(app.services.proving._turn.locked)
        started = time.monotonic()
        assert app.http.get("/health").status_code == 200
        assert time.monotonic() - started < 2
        check_error(slow.result(), 400, "ebnf", "invalid_value")


def test_a_request_with_many_slow_grammars_gives_its_turn_up(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, num_tried = make_app(fresh=True), 0

    def check(_: GrammarProver, grammar: str, vocab_size: int, eos_token_ids: Any, *, at_once: bool = False) -> None:
        nonlocal num_tried
        if at_once:
            raise UnknownGrammar
        num_tried += 1
        time.sleep(0.1)
        raise RequestError("it takes too long")

    monkeypatch.setattr(GrammarProver, "check", check)
    monkeypatch.setattr("nextn.server.grammar.MAX_TURN", 0.25)
    properties = {f"n{i}": {"type": "integer"} for i in range(100)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    body = {"model": "demo", "messages": HELLO, "tools": [tool], "tool_choice": "required"}
    found = app.http.post("/v1/chat/completions", json=body)
    check_error(found, 400, None, "invalid_request_error")
    assert "take more than 0.25 s" in found.json()["error"]["message"]
    assert num_tried <= 3
