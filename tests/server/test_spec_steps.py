"""What a client needs to colour accepted tokens: per step how many were drafted, accepted and emitted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from nextn.protocol.messages import SpecStep, first_steps

from tests.server.conftest import App, AppFactory
from tests.server.test_errors import check_error

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
ASKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}]},
    COMPLETIONS: {"prompt": "hello"},
}

Steps = dict[int, list[list[int]]]


def ask(app: App, path: str, stream: bool, **fields: Any) -> tuple[Steps, int]:
    """The steps of every choice, and the completion tokens of all."""
    body = {**ASKS[path], "stream": stream, **fields}
    found: Steps = {}
    if not stream:
        answer = app.http.post(path, json=body).json()
        for choice in answer["choices"]:
            found[choice["index"]] = choice["spec_steps"]
        return found, answer["usage"]["completion_tokens"]
    usage = {}
    response = app.http.post(path, json={**body, "stream_options": {"include_usage": True}})
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                found.setdefault(choice["index"], []).extend(choice.get("spec_steps", []))
    return found, usage["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 3])
def test_the_steps_emit_exactly_the_completion_tokens(app: App, path: str, n: int, stream: bool) -> None:
    steps, num_tokens = ask(app, path, stream, n=n, max_tokens=7, return_spec_steps=True)
    assert steps == {index: [[3, 1, 2]] * 3 + [[3, 0, 1]] for index in range(n)}
    assert num_tokens == 7 * n


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stop_string_in_mid_step_cuts_the_last_step(make_app: AppFactory, path: str, stream: bool) -> None:
    app = make_app()
    app.engine.behaviour.tokens_per_step = 5
    app.engine.behaviour.script = app.services.require_tokenizer().encode("one two three four five six seven eight")
    steps, num_tokens = ask(app, path, stream, max_tokens=100, stop="four", return_spec_steps=True)
    assert sum(emitted for _, _, emitted in steps[0]) == num_tokens < len(app.engine.behaviour.script)
    assert all(accepted <= emitted for _, accepted, emitted in steps[0])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_counts_the_drafts_of_the_steps_that_became_output(make_app: AppFactory, path: str, stream: bool) -> None:
    app = make_app()
    app.engine.behaviour.tokens_per_step = 40  # the stop string comes early in the only step
    app.engine.behaviour.script = app.services.require_tokenizer().encode("one two three four five six seven eight")
    body = {**ASKS[path], "max_tokens": 100, "stop": "two", "stream": stream}
    if stream:
        text = app.http.post(path, json={**body, "stream_options": {"include_usage": True}}).text
        usage = json.loads(text.split("\n\n")[-3].removeprefix("data: "))["usage"]
    else:
        usage = app.http.post(path, json=body).json()["usage"]
    details = usage["completion_tokens_details"]
    assert usage["completion_tokens"] == details["accepted_prediction_tokens"] < len(app.engine.behaviour.script)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_nobody_gets_steps_who_does_not_ask(app: App, path: str) -> None:
    for fields in ({}, {"return_spec_steps": False}, {"return_spec_steps": None}, {"stream": True}):
        assert "spec_steps" not in app.http.post(path, json={**ASKS[path], "max_tokens": 4, **fields}).text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("value", [1, "true", [], {}])
def test_a_wish_of_the_wrong_type_gets_400(app: App, path: str, value: object) -> None:
    check_error(app.http.post(path, json={**ASKS[path], "return_spec_steps": value}), 400, "return_spec_steps")


@pytest.mark.parametrize("stream", [False, True])
def test_the_native_answer_always_has_them(app: App, stream: bool) -> None:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 7, "n": 2}, "stream": stream}
    response = app.http.post(GENERATE, json=body)
    if stream:
        events = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n") if e.startswith("data: {")]
        answers = list({event["index"]: event for event in events}.values())
    else:
        answers = response.json()
    assert len(answers) == 2
    for answer in answers:
        steps = answer["meta_info"]["spec_steps"]
        assert sum(emitted for _, _, emitted in steps) == answer["meta_info"]["completion_tokens"] == 7
        assert [drafted for drafted, _, _ in steps] == [3, 3, 3, 3]


def test_cutting_steps_keeps_what_was_accepted_before_the_cut() -> None:
    steps = [SpecStep(0, 0, 1), SpecStep(3, 3, 4), SpecStep(3, 0, 1)]
    assert first_steps(steps, 6) == steps
    assert first_steps(steps, 5) == steps[:2]
    assert first_steps(steps, 3) == [SpecStep(0, 0, 1), SpecStep(3, 2, 2)]
    assert first_steps(steps, 0) == []
