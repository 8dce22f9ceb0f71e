"""``/v1/responses`` through the openai client: items, their events, and their way back in."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import msgspec
import pytest
from nextn.server.answers import ChatDelta, FunctionDelta, ToolCallDelta
from nextn.server.responses_items import OutputItems
from nextn.server.responses_request import ResponsesRequest, as_chat, sealed
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.conftest import MODEL, App, AppFactory
from tests.server.fake_engine import CONTEXT_LENGTH
from tests.server.test_chat import BOTH, PARSERS, TWO_CALLS, WEATHER, prompt_of, scripted
from tests.server.test_errors import check_error

TOOL: dict[str, Any] = {"type": "function", **WEATHER["function"]}
THOUGHT = "<think>Two and two.</think>\nFour."


def ask(app: App, stream: bool, **fields: Any) -> Any:
    """The whole response; of a stream the last event's, after its events were checked."""
    fields = {"model": MODEL, "input": "hello there", **fields}
    if not stream:
        return app.openai.responses.create(**fields)
    events = list(app.openai.responses.create(stream=True, **fields))
    check_events(events)
    return events[-1].response


def check_events(events: list[Any]) -> None:
    """Numbered, begun and ended as they should; what grows is what is done, and what the last event has."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.output == []
    assert events[0].response.status == "in_progress"
    final = events[-1].response
    assert events[-1].type == f"response.{'completed' if final.status == 'completed' else 'incomplete'}"
    assert {event.response.id for event in (events[0], events[1], events[-1])} == {final.id}
    grown: dict[str, str] = {}
    open_item = None
    done = []
    for event in events[2:-1]:
        kind = event.type.removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None, "one item at a time"
            assert event.item.status == "in_progress"
            open_item = event.item.id
            assert event.output_index == len(done)
            grown[open_item] = ""
        elif kind == "output_item.done":
            assert event.item.id == open_item
            done.append(event.item)
            open_item = None
        else:
            assert (event.item_id, event.output_index) == (open_item, len(done))
            if kind.endswith(".delta"):
                assert event.delta
                grown[event.item_id] += event.delta
            elif kind in ("output_text.done", "reasoning_text.done"):
                assert event.text == grown[event.item_id]
            elif kind == "function_call_arguments.done":
                assert event.arguments == grown[event.item_id]
            elif kind == "content_part.done":
                assert event.part.text == grown[event.item_id]
            else:
                assert kind == "content_part.added"
                assert event.part.text == ""
    assert done == final.output
    for item in final.output:
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert text == grown[item.id]


@BOTH
def test_an_answer_is_a_message(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "Hello! How can I help?")
    found = ask(app, stream, max_output_tokens=100, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    assert found.output_text == "Hello! How can I help?"
    (message,) = found.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (found.status, found.error, found.incomplete_details) == ("completed", None, None)
    assert (found.object, found.model, found.metadata, found.temperature) == ("response", MODEL, {"a": "b"}, 0.5)
    assert (found.instructions, found.max_output_tokens, found.store) == ("Be brief.", 100, False)
    assert prompt_of(app).count("<|system|>\nBe brief.") == 1
    (added,) = app.added
    assert added.sampling.max_new_tokens == 100
    assert added.sampling.temperature == 0.5
    usage = found.usage
    assert (usage.input_tokens, usage.total_tokens) == (len(added.input_ids), usage.input_tokens + usage.output_tokens)
    assert usage.output_tokens > 3
    assert usage.output_tokens_details.reasoning_tokens == 0


@BOTH
def test_reasoning_is_an_item_of_its_own(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, THOUGHT, *PARSERS)
    found = ask(app, stream)
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert found.output[0].content[0].text.strip() == "Two and two."
    assert found.output[0].encrypted_content is None
    assert found.output_text.strip() == "Four."
    assert 2 <= found.usage.output_tokens_details.reasoning_tokens < found.usage.output_tokens


@BOTH
def test_calls_are_items(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    found = ask(app, stream, tools=[TOOL])
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = found.output[2:]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"city": "Oslo", "days": 3}),
        ("get_weather", {"city": "Rome"}),
    ]
    assert len({call.call_id for call in calls}) == 2
    assert found.status == "completed"
    assert "get_weather" in prompt_of(app)
    assert [tool.name for tool in found.tools] == ["get_weather"]
    one = ask(app, stream, tools=[TOOL], parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["reasoning", "message", "function_call"]


@BOTH
def test_blanks_between_reasoning_and_a_call_are_no_message(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, TWO_CALLS.replace("Let me look.", ""), *PARSERS)
    found = ask(app, stream, tools=[TOOL])
    assert [item.type for item in found.output] == ["reasoning", "function_call", "function_call"]


@BOTH
def test_an_answer_that_is_cut_is_incomplete(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, "one two three four five six")
    found = ask(app, stream, max_output_tokens=4)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete"
    assert found.usage.output_tokens == 4


@BOTH
@pytest.mark.parametrize("include", [[], ["reasoning.encrypted_content"]])
def test_what_an_answer_had_can_be_sent_back(make_app: AppFactory, stream: bool, include: list[Any]) -> None:
    """The prompt is that of the same conversation as a chat, reasoning included, however it is handed back."""
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    found = ask(app, stream, tools=[TOOL], include=include)
    items = [item.model_dump(exclude_none=True) for item in found.output]
    if include:
        items[0]["content"] = None  # as clients that do not look into it
    outputs = [
        {"type": "function_call_output", "call_id": items[2]["call_id"], "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": items[3]["call_id"],
            "output": [{"type": "input_text", "text": "r"}],
        },
    ]
    user = {
        "role": "user",
        "content": [{"type": "input_text", "text": "hello "}, {"type": "input_text", "text": "you"}],
    }
    ask(app, stream, tools=[TOOL], input=[{"role": "developer", "content": "Be brief."}, user, *items, *outputs])
    calls = [
        {"id": call["call_id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in items[2:]
    ]
    app.openai.chat.completions.create(
        model=MODEL,
        tools=[WEATHER],  # type: ignore[list-item]
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "hello you"},
            {
                "role": "assistant",
                "content": items[1]["content"][0]["text"],
                "reasoning_content": "Two cities.",
                "tool_calls": calls,
            },
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"},
            {"role": "tool", "tool_call_id": calls[1]["id"], "content": "r"},
        ],
    )
    assert app.added[-2].input_ids == app.added[-1].input_ids
    assert "<think>Two cities.</think>" in prompt_of(app)


@BOTH
def test_what_the_client_writes_of_an_answer_can_be_sent_back(make_app: AppFactory, stream: bool) -> None:
    """With all the fields that its classes have, which are more than the answer had."""
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    found = ask(app, stream, tools=[TOOL], include=["reasoning.encrypted_content"])
    items = [item.model_dump() for item in found.output]
    assert None in items[2].values()
    ask(app, stream, tools=[TOOL], input=[{"role": "user", "content": "hello"}, *items])
    assert prompt_of(app).count("Oslo") == 1


@pytest.mark.parametrize("script", ["Hello!", TWO_CALLS])
def test_a_request_of_codex_is_answered_in_the_clients_own_types(make_app: AppFactory, script: str) -> None:
    """Every field that they require is there, and has their type."""
    app = scripted(make_app, script, *PARSERS)
    body = {
        "model": MODEL,
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "read only"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": sealed("a thought")},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "name": "get_weather", "arguments": "{}", "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        ],
        "tools": [{**TOOL, "strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"installation": "i"},
    }
    response = app.http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    events = [block.split("data: ", 1)[1] for block in response.text.strip().split("\n\n")]
    types: set[str] = set()
    for event in events:
        types.add(TypeAdapter(ResponseStreamEvent).validate_json(event).type)
    assert "response.completed" in types
    assert "<think>a thought</think>" in prompt_of(app)


def test_many_calls_in_a_row_are_read_soon() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    request = msgspec.json.decode(msgspec.json.encode({"input": [call] * 60_000}), type=ResponsesRequest)
    started = time.process_time()
    (message,) = as_chat(request, 100_000).messages
    assert time.process_time() - started < 3
    assert len(message.tool_calls or ()) == 60_000


def test_turns_of_the_assistant_that_follow_each_other_stay_apart(make_app: AppFactory) -> None:
    app = scripted(make_app, "ok")
    items = [
        {"role": "user", "content": "q"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "first"}], "id": "msg_1"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "of others"}]},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "again"},
    ]
    ask(app, False, input=items)
    prompt = prompt_of(app)
    assert prompt.count("<|assistant|>") == 3
    assert prompt.index("first") < prompt.index("second") < prompt.index("again")
    assert "of others" not in prompt


@BOTH
def test_the_answer_keeps_to_a_schema(make_app: AppFactory, stream: bool) -> None:
    app = scripted(make_app, '{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    found = ask(app, stream, text={"format": form})
    assert json.loads(found.output_text) == {"a": 1}
    assert app.added[-1].grammar is not None
    assert found.text.format.type == "json_schema"
    ask(app, stream, text={"format": {"type": "text"}, "verbosity": "medium"})
    assert app.added[-1].grammar is None


def test_a_forced_call_is_enforced(make_app: AppFactory) -> None:
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    found = ask(app, False, tools=[TOOL], tool_choice={"type": "function", "name": "get_weather"})
    assert app.added[-1].grammar is not None
    assert found.tool_choice.name == "get_weather"
    ask(app, False, tools=[TOOL], tool_choice="none")
    assert "get_weather" not in prompt_of(app)


def test_the_clients_own_way_of_streaming(make_app: AppFactory) -> None:
    """The openai package builds the response from the events itself."""
    app = scripted(make_app, TWO_CALLS, *PARSERS)
    with app.openai.responses.stream(model=MODEL, input="hello", tools=[TOOL]) as stream:  # type: ignore[list-item]
        types = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.output_text.delta" in types
    assert "response.function_call_arguments.delta" in types
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]


def test_events_are_named_and_nothing_follows_the_last(make_app: AppFactory) -> None:
    app = scripted(make_app, "Hello!")
    text = app.http.post("/v1/responses", json={"input": "hi", "stream": True}).text
    blocks = text.strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert blocks[-1].startswith("event: response.completed")


def test_thinking_follows_the_effort(make_app: AppFactory) -> None:
    app = scripted(make_app, "Hello!")
    ask(app, False, reasoning={"effort": "none"})
    assert prompt_of(app).endswith("<think></think>")
    ask(app, False, reasoning={"effort": "high", "summary": "auto"})
    assert prompt_of(app).endswith("<|assistant|>")


def test_a_stream_that_cannot_go_on_ends_with_the_reason(make_app: AppFactory) -> None:
    app = scripted(make_app, "one two three four five six seven eight nine ten")
    app.engine.behaviour.error_after_tokens = 4
    events = list(app.openai.responses.create(model=MODEL, input="hello", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.message
    (message,) = events[-1].response.output
    assert message.status == "incomplete"
    assert message.content[0].text == "".join(event.delta for event in events if "text.delta" in event.type) != ""
    with pytest.raises(httpx.HTTPStatusError):
        app.http.post("/v1/responses", json={"input": "hello"}).raise_for_status()


ITEM = "input[0]"
WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, ITEM),
    ({"input": [{"type": "web_search_call", "id": "ws_1", "action": {}}]}, f"{ITEM}.type"),
    ({"input": [{"role": "user"}]}, f"{ITEM}.content"),
    ({"input": [{"role": "robot", "content": "x"}]}, f"{ITEM}.role"),
    ({"input": [{"role": "user", "content": "x", "colour": 1}]}, f"{ITEM}.colour"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, f"{ITEM}.content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, f"{ITEM}.content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": {}}]}]}, f"{ITEM}.content[0].type"),
    ({"input": [{"type": [], "content": "x"}]}, f"{ITEM}.type"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, f"{ITEM}.arguments"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, f"{ITEM}.call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, f"{ITEM}.output"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]}, f"{ITEM}.encrypted_content"),
    ({"input": [{"type": "reasoning", "encrypted_content": "nextn:é"}]}, f"{ITEM}.encrypted_content"),
    ({"input": [{"type": "reasoning", "encrypted_content": "nextn:/w=="}]}, f"{ITEM}.encrypted_content"),
    ({"input": [{"role": "user", "content": "x"}] * (CONTEXT_LENGTH + 1)}, f"input[{CONTEXT_LENGTH}]"),
    ({"input": "x " * 2 * CONTEXT_LENGTH}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 2 * CONTEXT_LENGTH}, "input"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": {"id": "c"}}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"max_tool_calls": 2}, "max_tool_calls"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, "include[0]"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_object", "schema": {"type": "array"}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "strict": True}}}, "text.format.strict"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": 5}}]}, "tools[0].parameters.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "other"}, "tools": [TOOL]}, "tool_choice"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(param) for _, param in WRONG])
def test_what_is_wrong_or_not_served_is_refused_by_name(app: App, fields: dict[str, Any], param: str | None) -> None:
    check_error(app.http.post("/v1/responses", json={"input": "hello", **fields}), 400, param)


def test_what_asks_for_nothing_is_taken(make_app: AppFactory) -> None:
    app = scripted(make_app, "Hello!")
    neutral = {
        "store": False,
        "background": False,
        "truncation": "disabled",
        "include": [],
        "top_logprobs": 0,
        "service_tier": "auto",
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "user": "u",
        "stream_options": None,
        "tools": [],
        "tool_choice": "auto",
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": None},
        "max_tool_calls": None,
    }
    response = app.http.post("/v1/responses", json={"input": "hello", **neutral})
    assert response.status_code == 200, response.text


def test_how_deltas_are_cut_changes_no_item() -> None:
    def built(size: int) -> list[Any]:
        items = OutputItems(seals_reasoning=False)

        def cut(text: str) -> list[str]:
            return [text[i : i + size] for i in range(0, len(text), size)]

        deltas = [ChatDelta(reasoning_content=text) for text in cut("think of it")]
        deltas += [ChatDelta(content=text) for text in cut("\n\n  said")]
        deltas.append(ChatDelta(tool_calls=[ToolCallDelta(index=0, id="c", function=FunctionDelta(name="f"))]))
        deltas += [
            ChatDelta(tool_calls=[ToolCallDelta(index=0, function=FunctionDelta(arguments=text))])
            for text in cut('{"a": 1}')
        ]
        for delta in deltas:
            items.add(delta)
        items.end(is_cut=False)
        return [{name: value for name, value in item.items() if name != "id"} for item in items.items]

    assert built(1) == built(3) == built(100)
    assert built(1)[1]["content"][0]["text"] == "\n\n  said"


def test_blanks_belong_to_no_call_and_no_reasoning() -> None:
    items = OutputItems(seals_reasoning=False)
    call = ToolCallDelta(index=0, id="c", function=FunctionDelta(name="f"))
    arguments = ToolCallDelta(index=0, function=FunctionDelta(arguments="{}"))
    deltas = [
        ChatDelta(content="\n"),
        ChatDelta(reasoning_content="think"),
        ChatDelta(content="\n"),
        ChatDelta(tool_calls=[call]),
        ChatDelta(tool_calls=[arguments]),
    ]
    grown = "".join(event.get("delta", "") for delta in deltas for event in items.add(delta))
    items.end(is_cut=False)
    reasoning, called = items.items
    assert reasoning["content"][0]["text"] == "think"
    assert called["arguments"] == "{}"
    assert grown == "think{}"


def test_an_answer_of_blanks_alone_is_a_message() -> None:
    items = OutputItems(seals_reasoning=False)
    assert items.add(ChatDelta(content="\n")) == []
    events = items.end(is_cut=False)
    assert events[-1]["item"]["content"][0]["text"] == "\n"
