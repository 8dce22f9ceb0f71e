"""The error contract: whatever is wrong with a request, the answer is a 4xx that says what, in OpenAI's form."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from nextn.errors import CheckpointError
from nextn.server import chat_request
from nextn.server.errors import MAX_MESSAGE_LEN, MAX_PARAM_LEN, invalid
from nextn.server.http_protocol import MAX_HEADER_BYTES
from nextn.server.requests import ChatRequest
from nextn.server.sampling import SamplingDefaults

from tests.server.conftest import MODEL, App, AppFactory
from tests.server.fake_engine import CONTEXT_LENGTH, VOCAB_SIZE, Behaviour

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "hello"}]
HOSTILE = "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(7000)) + 'a7000: "x"\n'
UNIQUE = {
    "type": "function",
    "function": {
        "name": "f",
        "strict": True,
        "parameters": {"type": "object", "properties": {"ids": {"type": "array", "uniqueItems": True}}},
    },
}
WIDE = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {f"p{i}": {"type": "array", "items": {"enum": ["x" * 1000]}} for i in range(300)},
        },
    },
}
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": []}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PROPERTY = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x" * 5000: 1}}}}


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> None:
    """The status, and a body of exactly the contract's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in body["error"]["message"]
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


# (path, fields beside a valid prompt, the field at fault); every one is a 400
BAD_FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    (COMPLETIONS, {"temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"temperature": 2.1}, "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"temperature": True}, "temperature"),
    (COMPLETIONS, {"top_p": 0}, "top_p"),
    (COMPLETIONS, {"top_p": 1.5}, "top_p"),
    (COMPLETIONS, {"top_k": -2}, "top_k"),
    (COMPLETIONS, {"top_k": 1.5}, "top_k"),
    (COMPLETIONS, {"top_k": 10**30}, "top_k"),
    (COMPLETIONS, {"min_p": -0.5}, "min_p"),
    (COMPLETIONS, {"presence_penalty": 2.5}, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": -2.5}, "frequency_penalty"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"repetition_penalty": 1e-300}, "repetition_penalty"),
    (COMPLETIONS, {"repetition_penalty": -1}, "repetition_penalty"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias[...]"),
    (COMPLETIONS, {"logit_bias": {"5": "x"}}, "logit_bias[...]"),
    (COMPLETIONS, {"logit_bias": {"a": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": []}, "logit_bias"),
    (COMPLETIONS, {"stop": ["a"] * 1000}, "stop"),
    (COMPLETIONS, {"stop": ""}, "stop"),
    (COMPLETIONS, {"stop": "x" * 2000}, "stop"),
    (COMPLETIONS, {"stop": [1]}, "stop[0]"),
    (COMPLETIONS, {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    (COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    (COMPLETIONS, {"stop_token_ids": [1] * 129}, "stop_token_ids"),
    (COMPLETIONS, {"n": 0}, "n"),
    (COMPLETIONS, {"n": 10**6}, "n"),
    (COMPLETIONS, {"n": 10**100}, "n"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"seed": 2**64}, "seed"),
    (COMPLETIONS, {"seed": "x"}, "seed"),
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 2**31 - 1}, "prompt"),
    (COMPLETIONS, {"max_tokens": 10**25}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    (COMPLETIONS, {"min_tokens": -1}, "min_tokens"),
    (COMPLETIONS, {"stream": "yes"}, "stream"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["x", "y " * 2 * CONTEXT_LENGTH]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [[1] * CONTEXT_LENGTH]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": {}}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [VOCAB_SIZE]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [VOCAB_SIZE]]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [10**40]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]"),
    (COMPLETIONS, {"priority": 2**40}, "priority"),
    (COMPLETIONS, {"cache_salt": "x" * 300}, "cache_salt"),
    (COMPLETIONS, {"rid": ""}, "rid"),
    (COMPLETIONS, {"metadata": {"a": ["b"]}}, "metadata[...]"),
    (COMPLETIONS, {"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    (COMPLETIONS, {"no_such_field": 1}, "no_such_field"),
    (COMPLETIONS, {"max_new_tokens": 4}, "max_new_tokens"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "x"}}]}]},
        "messages[0].content[0].cache_control.type",
    ),
    (
        CHAT,
        {"messages": [*HELLO, {"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}]},
        "messages[1].reasoning_content",
    ),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": None, "reasoning": ""}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user", "content": None, "reasoning": "a"}]}, "messages[0].content"),
    (
        CHAT,
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[1].tool_calls[0].function.arguments",
    ),
    (CHAT, {"response_format": {"type": "grammar"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "text", "grammar": "x"}}, "response_format.grammar"),
    (CHAT, {"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    (CHAT, {"response_format": schema({"type": "strange"})}, "response_format.json_schema.schema"),
    (CHAT, {"response_format": schema(nested(80))}, "response_format.json_schema.schema"),
    (CHAT, {"response_format": schema({"enum": ["x" * 200_000]})}, "response_format.json_schema.schema"),
    (CHAT, {"response_format": schema({"type": "array", "uniqueItems": True})}, "response_format.json_schema.schema"),
    (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    (CHAT, {"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens"),
    (CHAT, {"response_format": {"type": "json_object"}, "regex": "a"}, "response_format"),
    (CHAT, {"regex": "a", "tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": schema({"x-guidance": {"lenient": True}})}, "response_format.json_schema.schema"),
    (CHAT, {"ebnf": "root ::= root"}, "ebnf"),
    (COMPLETIONS, {"ebnf": HOSTILE}, "ebnf"),
    (CHAT, {"regex": "a", "ebnf": 'root ::= "a"'}, "regex"),
    (CHAT, {"regex": "[a-"}, "regex"),
    (CHAT, {"json_schema": "{"}, "json_schema"),
    (CHAT, {"json_schema": "[]"}, "json_schema"),
    (COMPLETIONS, {"ebnf": "root ::= other"}, "ebnf"),
    (COMPLETIONS, {"json_schema": {"type": 3}}, "json_schema"),
    (GENERATE, {"sampling_params": {"regex": "("}}, "sampling_params.regex"),
    (GENERATE, {"sampling_params": {"regex": "a", "min_new_tokens": 1}}, "sampling_params.min_new_tokens"),
    (GENERATE, {"sampling_params": {"json_schema": nested(80)}}, "sampling_params.json_schema"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"tools": [], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": {**ALLOWED, "tools": [{"type": "function", "name": "g"}]}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {**ALLOWED, "mode": "none"}}, "tool_choice.mode"),
    (CHAT, {"tools": [TOOL], "tool_choice": {**ALLOWED, "mode": "required"}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "custom", "function": {"name": "f"}}}, "tool_choice.type"),
    (CHAT, {"tool_choice": "auto", "tools": [{"type": "x"}]}, "tools[0].type"),
    (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
    (CHAT, {"tools": [WIDE], "tool_choice": "required"}, "tools"),
    (CHAT, {"tools": [UNIQUE]}, "tools[0].function.parameters.properties.ids"),
    (CHAT, {"tools": "f"}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(80)}}]}, "tools"),
    (CHAT, {"tools": [{**TOOL, "x": [0] * 200_000}]}, "tools"),
    (CHAT, {"chat_template_kwargs": {"evil": 1}}, "chat_template_kwargs.evil"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    (CHAT, {"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"thinking": {"type": "adaptive"}}, "thinking.type"),
    (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
    (CHAT, {"thinking": {"clear_thinking": False}}, "thinking.clear_thinking"),
    (CHAT, {"chat_template_kwargs": {"clear_thinking": True}}, "chat_template_kwargs.clear_thinking"),
    (CHAT, {"enable_thinking": "no"}, "enable_thinking"),
    (CHAT, {"reasoning_effort": "extreme"}, "reasoning_effort"),
    (CHAT, {"reasoning_effort": {"effort": "low"}}, "reasoning_effort"),
    (CHAT, {"service_tier": "flex"}, "service_tier"),
    (CHAT, {"store": True}, "store"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"modalities": []}, "modalities"),
    (CHAT, {"request_id": ""}, "request_id"),
    (CHAT, {"rid": "a", "request_id": "b"}, "rid"),
    (CHAT, {"stream": True, "tool_stream": False}, "tool_stream"),
    (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    (CHAT, {"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    (CHAT, {"audio": {}}, "audio"),
    (CHAT, {"function_call": "auto"}, "function_call"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT, {"verbosity": "low"}, "verbosity"),
    (CHAT, {"web_search_options": {}}, "web_search_options"),
    (CHAT, {"echo": True}, "echo"),
    (COMPLETIONS, {"store": True}, "store"),
    (COMPLETIONS, {"service_tier": "priority"}, "service_tier"),
    (COMPLETIONS, {"reasoning_effort": "low"}, "reasoning_effort"),
    (GENERATE, {"input_ids": [1]}, "text"),
    (GENERATE, {"text": None}, "text"),
    (GENERATE, {"text": ""}, "text"),
    (GENERATE, {"text": []}, "text"),
    (GENERATE, {"text": None, "input_ids": []}, "input_ids"),
    (GENERATE, {"text": None, "input_ids": [VOCAB_SIZE]}, "input_ids"),
    (GENERATE, {"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    (GENERATE, {"sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
    (GENERATE, {"sampling_params": {"stop": [""]}}, "sampling_params.stop"),
    (GENERATE, {"sampling_params": {"logit_bias": {str(VOCAB_SIZE): 1}}}, "sampling_params.logit_bias"),
    (GENERATE, {"sampling_params": {"max_new_tokens": 1, "min_new_tokens": 2}}, "sampling_params.min_new_tokens"),
    (GENERATE, {"sampling_params": [{}, {}]}, "sampling_params"),
    (GENERATE, {"text": ["a", "b"], "sampling_params": [{}, {"regex": "("}]}, "sampling_params[1].regex"),
    (GENERATE, {"text": ["a", "b"], "sampling_params": [{}, {"stop": ""}]}, "sampling_params[1].stop"),
    (GENERATE, {"text": ["a", "b " * 2 * CONTEXT_LENGTH]}, "text[1]"),
    (GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
    (GENERATE, {"rid": ["a", "b"]}, "rid"),
    (GENERATE, {"text": ["a", "b"], "rid": ["a", "a"]}, "rid"),
    (GENERATE, {"top_logprobs_num": -1}, "top_logprobs_num"),
    (GENERATE, {"lora_path": "x"}, "lora_path"),
    (GENERATE, {"stream_options": {}}, "stream_options"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "x", "extra": 1}, "extra"),
    ("/tokenize", {"prompt": ["x"] * 1025}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
    ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
    ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
    ("/tokenize", {"messages": HELLO, "tools": [{}]}, "tools[0].type"),
    ("/tokenize", {}, "prompt"),
    ("/detokenize", {"tokens": [[1]] * 1025}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [1, [2]]}, "tokens"),
    ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
    ("/abort_request", {}, "rid"),
    ("/abort_request", {"rid": 5}, "rid"),
]

VALID: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "max_tokens": 4},
    COMPLETIONS: {"prompt": "hello"},
    GENERATE: {"text": "hello"},
}


STREAMED = [
    (path, {**fields, "stream": True}, param)
    for path, fields, param in BAD_FIELDS
    if path in VALID and "stream" not in fields and param != "stream_options"
]


@pytest.mark.parametrize(("path", "fields", "param"), BAD_FIELDS + STREAMED, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_a_400_that_names_it(app: App, path: str, fields: dict[str, Any], param: str | None) -> None:
    check_error(app.http.post(path, json={**VALID.get(path, {}), **fields}), 400, param)


RAW_BODIES = {
    "empty": b"",
    "cut off": b'{"prompt": "x"',
    "trailing": b'{"prompt": "x"} x',
    "not utf-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "\\udc00 x"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "too large a float": b'{"prompt": "x", "temperature": 1e999}',
    "a huge integer": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "binary": bytes(range(256)),
    "a BOM": b'\xef\xbb\xbf{"prompt": "x"}',
    "deep nesting": b'{"metadata": ' + b'{"a":' * 50_000,
    "deep prompt": b'{"prompt": ' + b"[" * 50_000,
    "form": b"prompt=x&n=1",
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE, "/tokenize", "/detokenize", "/abort_request"])
@pytest.mark.parametrize("name", RAW_BODIES)
def test_a_body_that_is_not_a_json_object_is_a_400(app: App, path: str, name: str) -> None:
    response = app.http.post(path, content=RAW_BODIES[name], headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    check_error(response, 400, response.json()["error"]["param"])


@pytest.mark.parametrize(("path", "prompt"), [(COMPLETIONS, "prompt"), (GENERATE, "input_ids")])
def test_a_prompt_over_the_context_is_context_length_exceeded(app: App, path: str, prompt: str) -> None:
    response = app.http.post(path, json={prompt: [1] * CONTEXT_LENGTH})
    check_error(response, 400, prompt, "context_length_exceeded")


def test_a_chat_prompt_plus_max_tokens_over_the_context_is_context_length_exceeded(app: App) -> None:
    response = app.http.post(CHAT, json={"messages": HELLO, "max_tokens": CONTEXT_LENGTH})
    check_error(response, 400, "messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": "foo"}, "found 'foo', expected 'auto', 'none', 'required' or an object."),
        ({"tool_choice": "x" * 5000}, "expected 'auto', 'none', 'required' or an object"),
        ({"n": 10**300}, "'n'"),
        ({"messages": [*HELLO, {"role": "robot", "content": "x"}]}, "'developer', 'system', 'tool' or 'user'"),
        ({"tool_choice": {"type": "custom"}}, "found 'custom', expected 'function' or 'allowed_tools'."),
        ({"thinking": {"type": "adaptive"}}, "expected 'disabled' or 'enabled'."),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "use 'anyOf'"),
        ({"tools": [{**TOOL, "type": "x" * 5000}]}, "expected 'function'"),
        ({"tools": [PROPERTY]}, "expected a JSON schema"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_message_says_what_is_expected_and_stays_short(app: App, fields: dict[str, Any], expected: str) -> None:
    error = app.http.post(CHAT, json={**VALID[CHAT], **fields}).json()["error"]
    assert expected in error["message"]
    assert len(error["message"]) < 400
    assert len(error["param"]) < 250
    assert "coerce" not in error["message"]


def test_no_error_is_longer_than_can_be_read() -> None:
    detail = invalid("x" * 5000, "y" * 5000).detail
    assert len(detail.message) == MAX_MESSAGE_LEN
    assert len(detail.param or "") == MAX_PARAM_LEN


CALL = {"function": {"name": "f", "arguments": "not read"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (HELLO * (CONTEXT_LENGTH + 1), "messages"),
        ([*HELLO, {"role": "user", "content": [{"type": "text"}] * CONTEXT_LENGTH}], "messages[1].content"),
        ([*HELLO, {"role": "assistant", "tool_calls": [CALL] * CONTEXT_LENGTH}], "messages[1].tool_calls"),
    ],
    ids=["messages", "parts", "calls"],
)
def test_more_messages_than_the_context_has_tokens_are_not_even_read(
    app: App, monkeypatch: pytest.MonkeyPatch, messages: list[Any], param: str
) -> None:
    monkeypatch.setattr(chat_request, "_message", None)
    response = app.http.post(CHAT, json={"messages": messages})
    check_error(response, 400, param, "context_length_exceeded")
    assert f" {CONTEXT_LENGTH} tokens" in response.json()["error"]["message"]


def test_the_garbage_collector_does_not_walk_what_a_client_sent() -> None:
    body = json.dumps({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}).encode()
    message = msgspec.json.decode(body, type=ChatRequest).messages[0]
    assert message.tool_calls
    assert not any(map(gc.is_tracked, (message, message.tool_calls[0], message.tool_calls[0].function)))


def test_more_token_ids_than_the_context_has_are_not_even_read(app: App) -> None:
    ids = [VOCAB_SIZE] * (CONTEXT_LENGTH + 1)
    check_error(app.http.post(COMPLETIONS, json={"prompt": ids}), 400, "prompt", "context_length_exceeded")


def test_a_long_conversation_is_read_in_a_thread(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    read, loops = chat_request._message, []

    def watched(message: Any, where: str) -> Any:
        loops.append(asyncio._get_running_loop())
        return read(message, where)

    monkeypatch.setattr(chat_request, "_message", watched)
    messages = [{"role": "user", "content": "hello " * 50}] * 100
    assert app.http.post(CHAT, json={"messages": messages}).json()["error"]["param"] == "messages"
    assert loops == [None] * 100


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
def test_an_unknown_model_is_a_404(app: App, path: str) -> None:
    body = {**VALID.get(path, {"prompt": "x"}), "model": "gpt-9"}
    check_error(app.http.post(path, json=body), 404, "model", "model_not_found")
    check_error(app.http.get("/v1/models/gpt-9"), 404, "model", "model_not_found")


def test_unknown_paths_and_methods_answer_in_the_contract_form(app: App) -> None:
    check_error(app.http.get("/nope"), 404, None, "not_found")
    response = app.http.get(COMPLETIONS)
    check_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"].endswith("use POST.")


def test_a_body_over_the_limit_is_a_413_before_it_is_read(make_app: AppFactory) -> None:
    app = make_app("--max-body-bytes", "1024")
    check_error(app.http.post(COMPLETIONS, content=b"x" * 2000), 413, None, "request_too_large")
    chunked = app.http.post(COMPLETIONS, content=iter([b"x" * 600] * 3))
    check_error(chunked, 413, None, "request_too_large")


def test_headers_over_the_limit_are_refused(app: App) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    assert raw_exchange(app, head + b"x-filler: " + b"y" * (2 * MAX_HEADER_BYTES)).startswith(b"HTTP/1.1 431")
    many = b"".join(b"x-%d: y\r\n" % i for i in range(MAX_HEADER_BYTES // 4))
    assert raw_exchange(app, head + many).startswith(b"HTTP/1.1 431")
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    assert raw_exchange(app, chunked + 8 * many).startswith(b"HTTP/1.1 431")


def test_a_body_in_many_small_chunks_is_read(app: App) -> None:
    body = json.dumps({"prompt": "x" * 20_000, "no_such_field": 1}).encode()
    check_error(app.http.post(COMPLETIONS, content=(bytes([byte]) for byte in body)), 400, "no_such_field")


def test_bytes_that_are_not_http_get_a_400(app: App) -> None:
    answer = raw_exchange(app, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


def raw_exchange(app: App, data: bytes) -> bytes:
    """Send bytes, return all that comes back."""
    port = httpx.URL(app.url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            pass
        return answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_a_full_queue_is_a_429_with_retry_after(make_app: AppFactory, path: str, stream: bool) -> None:
    app = make_app(behaviour=Behaviour(queue_limit=0))
    response = app.http.post(path, json={**VALID[path], "stream": stream})
    check_error(response, 429, None, "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        app.openai.completions.create(model=MODEL, prompt="x")


def test_when_one_choice_finds_the_queue_full_the_others_are_stopped(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(queue_limit=2))
    check_error(app.http.post(COMPLETIONS, json={"prompt": "x", "n": 4, "max_tokens": 400}), 429, None)
    app.wait_until_idle()


def test_a_request_before_the_model_is_loaded_is_a_503(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(load_seconds=0.5), wait=False)
    for path, body in VALID.items():
        check_error(app.http.post(path, json=body), 503, None, "unavailable")
    check_error(app.http.get("/health"), 503, None, "unavailable")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_an_engine_error_before_the_first_token_is_a_500_with_its_reason(make_app: AppFactory, path: str) -> None:
    app = make_app(behaviour=Behaviour(error_after_tokens=0))
    for stream in (False, True):
        response = app.http.post(path, json={**VALID[path], "stream": stream})
        check_error(response, 500, None, "internal_error")
        assert "a kernel failed" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_an_engine_error_in_mid_stream_is_an_error_event_and_the_end(make_app: AppFactory, path: str) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.2, tokens_per_step=1))
    events = []
    with app.http.stream("POST", path, json={**VALID[path], "stream": True}) as response:
        assert response.status_code == 200
        for line in filter(None, response.iter_lines()):
            events.append(line.removeprefix("data: "))
            app.engine.behaviour.error_after_tokens = 0
    assert "error" not in json.loads(events[0])
    assert json.loads(events[-1])["error"]["message"] == "a kernel failed"
    assert "[DONE]" not in events


def test_two_running_requests_may_not_share_a_rid(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.05))
    with app.http.stream("POST", GENERATE, json={"text": "x", "rid": "r", "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        check_error(
            app.http.post(GENERATE, json={"text": "x", "rid": "r", "sampling_params": {"max_new_tokens": 4}}),
            400,
            "rid",
        )
    app.wait_until_idle()
    assert (
        app.http.post(GENERATE, json={"text": "x", "rid": "r", "sampling_params": {"max_new_tokens": 4}}).status_code
        == 200
    )


def test_more_requests_than_can_run_and_wait_are_a_429_without_asking_the_engine(make_app: AppFactory) -> None:
    app = make_app("--max-running-requests", "2", "--max-queued-requests", "1")
    app.engine.behaviour.step_seconds = 0.05
    with app.http.stream("POST", GENERATE, json={"text": "x", "stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        check_error(app.http.post(COMPLETIONS, json={"prompt": "x", "n": 3}), 429, None, "queue_full")
    assert len(app.added) == 1
    app.wait_until_idle()
    assert app.http.post(COMPLETIONS, json={"prompt": "x", "n": 3}).status_code == 200


def test_more_choices_than_can_ever_run_and_wait_are_a_400(make_app: AppFactory) -> None:
    app = make_app("--max-running-requests", "2", "--max-queued-requests", "1")
    check_error(app.http.post(COMPLETIONS, json={"prompt": "x", "n": 4}), 400, "prompt", "invalid_value")
    check_error(app.http.post(GENERATE, json={"text": ["x"] * 4}), 400, "text", "invalid_value")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ('{"top_p": 0}', "found temperature 1 and top_p 0, expected"),
        ('{"temperature": -1}', "found temperature -1 and top_p 1, expected"),
        ('{"temperature": NaN}', "found temperature nan and top_p 1, expected"),
        ("[]", "cannot be read"),
    ],
)
def test_defaults_that_no_request_can_have_are_refused_at_start(given: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(given)
    with pytest.raises(CheckpointError, match=complaint):
        SamplingDefaults.from_checkpoint(str(tmp_path))
