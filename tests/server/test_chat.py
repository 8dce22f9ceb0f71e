"""``/v1/chat/completions`` through the openai client: text, reasoning, tool calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from tests.server.conftest import MODEL, App, AppFactory
from tests.server.fake_engine import CONTEXT_LENGTH

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TWO_CALLS = (
    "<think>Two cities.</think>\nLet me look."
    "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
)
PARSERS = ("--tool-call-parser", "glm45", "--reasoning-parser", "glm45")


def scripted(make_app: AppFactory, text: str, *flags: str) -> App:
    """A server whose engine always says ``text``."""
    app = make_app(*flags)
    app.engine.behaviour.script = app.services.require_tokenizer().encode(text, add_special_tokens=False)
    return app


def ask(app: App, stream: bool, **fields: Any) -> dict[str, Any]:
    """A message with its finish reason, from one piece or joined from chunks as clients join them."""
    fields = {"model": MODEL, "messages": HELLO, **fields}
    if not stream:
        choice = app.openai.chat.completions.create(**fields).choices[0]
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        reasoning = getattr(message, "reasoning_content", None)
        content = message.content
        ids = [call.id for call in message.tool_calls or []]
        reason = choice.finish_reason
    else:
        chunks = list(app.openai.chat.completions.create(stream=True, **fields))
        content, reasoning, calls, ids, reason = join(chunks)
    assert len(set(ids)) == len(ids)
    assert all(ids)
    return {"content": content or "", "reasoning": reasoning or "", "calls": calls, "reason": reason}


def join(chunks: list[ChatCompletionChunk]) -> tuple[str, str, list[tuple[str, str]], list[str], str | None]:
    content = reasoning = ""
    calls: list[list[str]] = []
    reason = None
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                if call.index == len(calls):
                    assert call.id
                    assert call.type == "function"
                    calls.append([call.id, call.function.name or "", ""])
                else:
                    assert call.function.name is None, "a name is sent once"
                calls[call.index][2] += call.function.arguments or ""
    return content, reasoning, [(name, text) for _, name, text in calls], [call[0] for call in calls], reason


BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@BOTH
def test_an_answer_has_the_text_that_was_generated(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "Hello! How can I help?")
    found = ask(app, stream, max_tokens=100)
    assert found == {"content": "Hello! How can I help?", "reasoning": "", "calls": [], "reason": "stop"}


def test_the_first_chunk_has_the_role_and_the_last_the_usage(app: App) -> None:
    chunks = list(
        app.openai.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_max_tokens_defaults_to_what_the_context_leaves(make_app: AppFactory) -> None:
    app = scripted(make_app, "Hello!")
    ask(app, False)
    (added,) = app.added
    assert added.sampling.max_new_tokens == CONTEXT_LENGTH - len(added.input_ids)
    ask(app, False, max_completion_tokens=7)
    assert app.added[-1].sampling.max_new_tokens == 7


def test_the_prompt_is_the_chat_template_over_the_messages(make_app: AppFactory) -> None:
    app = scripted(make_app, "Hello!")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None},
        {"role": "user", "content": "four"},
    ]
    ask(app, False, messages=messages, user="u", metadata={"a": "b"}, store=False)
    prompt = prompt_of(app)
    assert "<|system|>\nBe brief." in prompt
    assert "one two" in prompt
    assert "three" in prompt
    assert prompt.endswith("<|assistant|>")


def prompt_of(app: App) -> str:
    return app.services.require_tokenizer().decode(app.added[-1].input_ids, skip_special_tokens=False)


def test_enable_thinking_reaches_the_template(make_app: AppFactory) -> None:
    app = scripted(make_app, "Hello!")
    ask(app, False, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert prompt_of(app).endswith("<think></think>")
    ask(app, False, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert prompt_of(app).endswith("<|assistant|>")


@BOTH
def test_reasoning_is_set_apart(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "<think>Two and two.</think>\nFour.", *PARSERS)
    found = ask(app, stream)
    assert found["reasoning"].strip() == "Two and two."
    assert found["content"].strip() == "Four."
    whole = ask(app, stream, extra_body={"separate_reasoning": False})
    assert whole["reasoning"] == ""
    assert "Two and two." in whole["content"]


@BOTH
def test_reasoning_cut_by_length_is_still_reasoning(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "<think>one two three four five six</think>seven", *PARSERS)
    found = ask(app, stream, max_tokens=4)
    assert found["reasoning"].strip().startswith("one")
    assert found["content"] == ""
    assert found["reason"] == "length"


@BOTH
def test_tool_calls_come_as_names_and_json(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    found = ask(app, stream, tools=[WEATHER])
    assert [(name, json.loads(text)) for name, text in found["calls"]] == [
        ("get_weather", {"city": "Oslo", "days": 3}),
        ("get_weather", {"city": "Rome"}),
    ]
    assert found["reason"] == "tool_calls"
    assert found["reasoning"].strip() == "Two cities."
    assert found["content"].strip() == "Let me look."
    assert "get_weather" in prompt_of(app)


@BOTH
def test_without_parallel_tool_calls_one_call_ends_the_answer(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, TWO_CALLS + " and more" * 40, *PARSERS)
    found = ask(app, stream, tools=[WEATHER], parallel_tool_calls=False)
    assert [name for name, _ in found["calls"]] == ["get_weather"]
    assert json.loads(found["calls"][0][1]) == {"city": "Oslo", "days": 3}
    assert found["reason"] == "tool_calls"
    app.wait_until_idle()


@BOTH
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("said", "limit", "reason"),
    [
        (TWO_CALLS, {"stop": "lo</arg"}, "stop"),
        (TWO_CALLS.partition("lo</arg")[0], {}, "stop"),
        (TWO_CALLS.partition("lo</arg")[0] + "!" * 40, {"max_tokens": 40}, "length"),
    ],
    ids=["stop string", "eos", "length"],
)
def test_a_call_that_is_cut_is_no_reason_to_call(
    make_app: AppFactory, said: str, limit: dict[str, Any], reason: str, parallel: bool, stream: bool
) -> None:
    app = scripted(make_app, said, *PARSERS)
    found = ask(app, stream, tools=[WEATHER], parallel_tool_calls=parallel, **limit)
    ((name, arguments),) = found["calls"]
    assert name == "get_weather"
    assert json.loads(arguments)["city"].startswith("Os")
    assert found["reason"] == reason


@BOTH
def test_tool_choice_none_hides_the_tools(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    found = ask(app, stream, tools=[WEATHER], tool_choice="none")
    assert found["calls"] == []
    assert found["reason"] == "stop"
    assert "get_weather" not in prompt_of(app)


def test_of_allowed_tools_alone_the_model_is_told(app: App) -> None:
    other: Any = {"type": "function", "function": {"name": "get_time"}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    ask(
        app,
        False,
        tools=[WEATHER, other],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        max_tokens=2,
    )
    assert "get_time" in prompt_of(app)
    assert "get_weather" not in prompt_of(app)
    assert app.added[-1].grammar is None


def test_a_tool_call_and_its_result_can_be_sent_back(make_app: AppFactory) -> None:
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    message = (
        app.openai.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[WEATHER],  # type: ignore[list-item]
        )
        .choices[0]
        .message
    )
    assert message.tool_calls
    history = [
        *HELLO,
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    ask(app, False, messages=history, tools=[WEATHER])
    assert "<arg_value>Oslo</arg_value>" in prompt_of(app)
    assert "sunny" in prompt_of(app)


@BOTH
def test_logprobs_cover_every_token(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "one two three")
    fields: dict[str, Any] = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    if stream:
        chunks = app.openai.chat.completions.create(stream=True, **fields)
        found = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content or []]
    else:
        logprobs = app.openai.chat.completions.create(**fields).choices[0].logprobs
        assert logprobs is not None
        found = logprobs.content or []
    assert len(found) == 3
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in found)
    assert "one two three".startswith("".join(token.token for token in found))


@BOTH
def test_choices_are_independent(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "<think>a b</think>c d", *PARSERS)
    fields: dict[str, Any] = {"model": MODEL, "messages": HELLO, "n": 3}
    contents = {0: "", 1: "", 2: ""}
    if stream:
        for chunk in app.openai.chat.completions.create(stream=True, **fields):
            for choice in chunk.choices:
                contents[choice.index] += choice.delta.content or ""
    else:
        for whole in app.openai.chat.completions.create(**fields).choices:
            contents[whole.index] = whole.message.content or ""
    assert contents == {0: "c d", 1: "c d", 2: "c d"}
    seeds = [added.sampling.seed for added in app.added]
    assert [seed - seeds[0] for seed in seeds] == [0, 1, 2]


@BOTH
def test_a_stop_string_ends_a_chat_answer(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "one two three four five")
    assert ask(app, stream, stop=["three"])["content"] == "one two "
    app.wait_until_idle()
