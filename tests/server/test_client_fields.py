"""Fields that real clients send beside OpenAI's core: each has the effect that it asks for, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from nextn.server.neutral import NEUTRAL
from nextn.text.tokenizer import Tokenizer

from tests.server.conftest import MODEL, App, AppFactory, run_app
from tests.server.fake_engine import Behaviour
from tests.server.test_chat import BOTH, HELLO, PARSERS, TWO_CALLS, WEATHER, ask, prompt_of, scripted
from tests.server.test_errors import CHAT, check_error

PRINTS_ALL = """[gMASK]<sop>
{%- for m in messages -%}
    {{- '<|' + m.role + '|>' -}}
    {%- if m.reasoning_content is defined and clear_thinking is defined and not clear_thinking -%}
        {{- '<think>' + m.reasoning_content + '</think>' -}}
    {%- endif -%}
    {{- m.content -}}
{%- endfor -%}
<|assistant|>"""
"""As GLM-4.7's, it reads clear_thinking and prints a content that is no text as it is; thinking is not its choice."""


def raw_prompt(app: App, **fields: Any) -> list[int]:
    """The prompt that a body posted as it stands leads to."""
    response = app.http.post(CHAT, json={"messages": HELLO, "max_tokens": 2, **fields})
    assert response.status_code == 200, response.text
    return app.added[-1].input_ids


THINKING_OFF: list[dict[str, Any]] = [
    {"thinking": {"type": "disabled"}},
    {"enable_thinking": False},
    {"reasoning_effort": "none"},
    {"thinking": {"type": "disabled"}, "reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}},
]
THINKING_ON: list[dict[str, Any]] = [
    {"thinking": {"type": "enabled"}},
    {"enable_thinking": True},
    *({"reasoning_effort": effort} for effort in ("minimal", "low", "medium", "high", "xhigh", "max")),
    {"thinking": {"type": "enabled"}, "reasoning_effort": "high"},
    {"thinking": None, "enable_thinking": None, "reasoning_effort": None, "chat_template_kwargs": None},
    {"thinking": {"type": None}, "chat_template_kwargs": {"enable_thinking": None}},
]


@pytest.mark.parametrize("fields", THINKING_OFF, ids=json.dumps)
def test_thinking_is_turned_off_as_the_template_argument_does(make_app: AppFactory, fields: dict[str, Any]) -> None:
    app = scripted(make_app, "Hello!")
    expected = raw_prompt(app, chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(app).endswith("<think></think>")
    ask(app, False, extra_body=fields)
    assert app.added[-1].input_ids == expected


@pytest.mark.parametrize("fields", THINKING_ON, ids=json.dumps)
def test_thinking_stays_on_as_the_template_argument_does(make_app: AppFactory, fields: dict[str, Any]) -> None:
    app = scripted(make_app, "Hello!")
    expected = raw_prompt(app, chat_template_kwargs={"enable_thinking": True})
    ask(app, False, extra_body=fields)
    assert app.added[-1].input_ids == expected == raw_prompt(app)


CONTRADICTIONS: list[dict[str, Any]] = [
    {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}},
    {"thinking": {"type": "disabled"}, "reasoning_effort": "high"},
    {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
    {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
    {"rid": "a", "request_id": "b"},
    {"max_tokens": 3, "max_completion_tokens": 4},
]


@pytest.mark.parametrize("fields", CONTRADICTIONS, ids=json.dumps)
def test_fields_that_contradict_each_other_are_refused_naming_both(app: App, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        app.openai.chat.completions.create(model=MODEL, messages=HELLO, extra_body=fields)
    first, second = fields
    assert caught.value.param is not None
    assert caught.value.param.startswith(first)
    assert first in caught.value.message
    assert second in caught.value.message


@pytest.fixture
def prints_all(model_path: Path, tmp_path: Path) -> Tokenizer:
    (tmp_path / "template.jinja").write_text(PRINTS_ALL)
    return Tokenizer(model_path, tmp_path / "template.jinja")


@pytest.mark.parametrize("field", ["thinking", "chat_template_kwargs"])
def test_clear_thinking_reaches_a_template_that_reads_it(model_path: Path, prints_all: Tokenizer, field: str) -> None:
    history = [*HELLO, {"role": "assistant", "content": "Hi.", "reasoning_content": "greet"}, *HELLO]
    with run_app(model_path, prints_all, Behaviour(), ()) as app:
        kept = raw_prompt(app, messages=history, **{field: {"clear_thinking": False}})
        assert "<think>greet</think>" in prints_all.decode(kept)
        cleared = raw_prompt(app, messages=history, **{field: {"clear_thinking": True}})
        assert "greet" not in prints_all.decode(cleared)
        assert cleared == raw_prompt(app, messages=history)


def test_what_the_template_does_not_read_is_refused(model_path: Path, prints_all: Tokenizer) -> None:
    with run_app(model_path, prints_all, Behaviour(), ()) as app:
        for fields, param in [
            ({"thinking": {"type": "disabled"}}, "thinking.type"),
            ({"reasoning_effort": "none"}, "reasoning_effort"),
            ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ]:
            response = app.http.post(CHAT, json={"messages": HELLO, "max_tokens": 2, **fields})
            check_error(response, 400, param, "unsupported_parameter")


def test_contents_that_templates_cannot_print_become_text(model_path: Path, prints_all: Tokenizer) -> None:
    call = {"id": "c", "type": None, "function": {"name": "get_weather", "arguments": None}}
    parts = [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny", "cache_control": {"type": "ephemeral"}}]
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
    ]
    with run_app(model_path, prints_all, Behaviour(), ()) as app:
        text = prints_all.decode(raw_prompt(app, messages=messages), skip_special_tokens=False)
    assert text.endswith("hello there<|assistant|><|tool|>sunny<|assistant|>")


def test_reasoning_is_another_name_for_reasoning_content(app: App) -> None:
    call = {"id": "c", "function": {"name": "get_weather", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c", "content": "sunny"}
    expected = raw_prompt(app, messages=[*HELLO, {**turn, "reasoning_content": "look it up"}, result])
    assert "look it up" in prompt_of(app)
    for echoed in ({"reasoning": "look it up"}, {"reasoning": "look it up", "reasoning_content": "look it up"}):
        assert raw_prompt(app, messages=[*HELLO, {**turn, **echoed}, result]) == expected


def test_a_turn_may_have_been_nothing_but_reasoning(app: App) -> None:
    call = {"id": "c", "function": {"name": "get_weather", "arguments": "{}"}}
    acting = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "sunny"}]
    for name in ("reasoning_content", "reasoning"):
        raw_prompt(app, messages=[*HELLO, {"role": "assistant", "content": None, name: "look it up"}, *acting])
        assert "look it up" in prompt_of(app)


LABELS: dict[str, Any] = {
    "user": "u",
    "metadata": {"run": "7"},
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "store": False,
}


@pytest.mark.parametrize("tier", ["auto", "default"])
def test_labels_and_wishes_that_hold_anyway_change_nothing(app: App, tier: str) -> None:
    plain = {"model": MODEL, "seed": 1, "max_tokens": 6}
    chat, completions = app.openai.chat.completions, app.openai.completions
    whole = chat.create(messages=HELLO, **plain)
    labelled = chat.create(
        messages=HELLO,
        service_tier=tier,
        modalities=["text"],
        response_format={"type": "text"},
        tool_choice="auto",
        logit_bias={},
        n=1,
        extra_body={"user_id": "u", "do_sample": True, "tool_stream": True},
        **plain,
        **LABELS,
    )
    assert labelled.choices == whole.choices
    text = completions.create(prompt="hello", **plain)
    fields = {**LABELS, "service_tier": tier, "best_of": 1, "suffix": None}
    assert completions.create(prompt="hello", extra_body=fields, **plain).choices == text.choices
    assert all(message.sampling == app.added[0].sampling for message in app.added)


def test_a_field_that_is_null_is_a_field_that_is_absent(app: App) -> None:
    schema = app.http.get("/openapi.json").json()["components"]["schemas"]
    absent = dict.fromkeys(set(schema["ChatRequest"]["properties"]) - {"messages"})
    message = dict.fromkeys(set(schema["Message"]["properties"]))
    message |= {"role": "user", "content": "hello there"}
    body = {**absent, "max_tokens": 2}
    assert raw_prompt(app, **body) == raw_prompt(app, **body, messages=[message]) == raw_prompt(app)
    fields = dict.fromkeys(set(schema["CompletionRequest"]["properties"]) - {"prompt"})
    response = app.http.post("/v1/completions", json={**fields, "prompt": "hello"})
    assert response.status_code == 200, response.text


SENT_ALWAYS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"continue_final_message": False, "stream_reasoning": True, "return_hidden_states": False}),
    (CHAT, {"logprobs": False, "top_logprobs": 0, "spaces_between_special_tokens": True}),
    ("/v1/completions", {"return_hidden_states": False, "spaces_between_special_tokens": False}),
    ("/generate", {"lora_path": None, "return_logprob": False, "return_routed_experts": False, "image_data": None}),
    (
        "/generate",
        {
            "return_hidden_states": False,
            "log_metrics": True,
            "background": False,
            "no_logs": False,
            "return_bytes": False,
            "return_entropy": False,
        },
    ),
]
"""What sglang's load generator and its router put into every request."""

VALID: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "max_tokens": 4, "seed": 1},
    "/v1/completions": {"prompt": "hello", "max_tokens": 4, "seed": 1},
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 4, "seed": 1}},
}


@pytest.mark.parametrize(("path", "fields"), SENT_ALWAYS, ids=str)
def test_fields_that_ask_for_nothing_change_nothing(app: App, path: str, fields: dict[str, Any]) -> None:
    for body in (VALID[path], {**VALID[path], **fields}):
        response = app.http.post(path, json=body)
        assert response.status_code == 200, response.text
    plain, sent = app.added
    assert (sent.input_ids, sent.sampling, sent.num_top_logprobs) == (plain.input_ids, plain.sampling, None)


@pytest.mark.parametrize(("path", "fields"), SENT_ALWAYS, ids=str)
def test_what_they_could_ask_for_is_refused_in_words(app: App, path: str, fields: dict[str, Any]) -> None:
    for name in NEUTRAL.keys() & fields.keys():
        response = app.http.post(path, json={**VALID[path], name: not fields[name]})
        check_error(response, 400, name, "unsupported_parameter")
        assert f"as {str(fields[name]).lower()} only" in response.json()["error"]["message"]


def test_messages_may_have_a_type_and_ask_to_be_cached(app: App) -> None:
    """As lm-eval and Responses clients send them, and as proxies in front of Anthropic's clients do."""
    expected = raw_prompt(app)
    for asked in ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}):
        parts = [{"type": "text", "text": HELLO[-1]["content"], "cache_control": asked}]
        assert raw_prompt(app, messages=[*HELLO[:-1], {**HELLO[-1], "content": parts}]) == expected
        assert raw_prompt(app, messages=[{**message, "cache_control": asked} for message in HELLO]) == expected
    for kind in ("text", "message"):
        assert raw_prompt(app, messages=[{**message, "type": kind} for message in HELLO]) == expected


def test_do_sample_false_is_greedy_whatever_the_temperature(app: App) -> None:
    raw_prompt(app, do_sample=False, temperature=0.7)
    raw_prompt(app, do_sample=True, temperature=0.7)
    raw_prompt(app, temperature=0.7)
    assert [message.sampling.temperature for message in app.added] == [0.0, 0.7, 0.7]


def test_a_request_id_is_the_id_of_the_answer(app: App) -> None:
    answer = app.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, extra_body={"request_id": "mine"}
    )
    assert answer.id == "mine"
    assert app.added[-1].rid == "mine"


@pytest.mark.parametrize("stream", [False, True])
def test_deprecated_and_foreign_fields_say_what_to_do_instead(app: App, stream: bool) -> None:
    for name, value, instead in [
        ("functions", [{"name": "f"}], "'tools'"),
        ("function_call", "auto", "'tool_choice'"),
        ("service_tier", "priority", "'auto' or 'default'"),
        ("modalities", ["text", "audio"], "text"),
    ]:
        with pytest.raises(openai.BadRequestError, match=instead) as caught:
            app.openai.chat.completions.create(
                model=MODEL, messages=HELLO, stream=stream, max_tokens=2, extra_body={name: value}
            )
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_continuous_usage_counts_up_to_the_total(app: App, path: str, with_last: bool) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": ["hello there", "x"]}
    body |= {"max_tokens": 12, "n": 2, "seed": 1}
    total = app.http.post(path, json=body).json()["usage"]
    app.engine.behaviour.step_seconds = 0.05  # a late server joins steps into one chunk
    options = {"continuous_usage_stats": True, "include_usage": with_last, "include_obfuscation": False}
    response = app.http.post(path, json={**body, "stream": True, "stream_options": options})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    chunks = [json.loads(event) for event in events[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert chunks[-1]["usage"] == total
    assert (chunks[-1]["choices"] == []) == with_last
    if path == CHAT:
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {total["prompt_tokens"]}


@BOTH
def test_a_conversation_goes_on_with_the_answers_as_clients_dump_them(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    tool: Any = {"type": "function", "function": {**WEATHER["function"], "strict": False}}  # type: ignore[dict-item]
    message = app.openai.chat.completions.create(model=MODEL, messages=HELLO, tools=[tool]).choices[0].message
    assert message.tool_calls
    results = [
        {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": [{"type": "text", "text": "sunny"}]}
        for call in message.tool_calls
    ]
    answer = {**message.model_dump(), "annotations": [], "name": None}
    prompts = []
    for echoed in (answer, message.model_dump(exclude_none=True)):
        ask(app, stream, messages=[*HELLO, echoed, *results], tools=[tool])
        prompts.append(prompt_of(app))
    assert prompts[0] == prompts[1]
    assert "Two cities." in prompts[0]
    assert prompts[0].count("<tool_response>\nsunny\n</tool_response>") == 2
