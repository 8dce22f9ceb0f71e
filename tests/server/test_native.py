"""``/generate``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import App, AppFactory
from tests.server.fake_engine import EOS, Behaviour


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of every event; checks that the stream ends as the API says."""
    return parsed(response.text.splitlines())


def events_of_every_step(app: App, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of one request, one a step: a step begins when the event of the one before has been read.

    A server that is late joins the steps it has missed into one event, as it should.
    """
    engine = app.engine
    engine.behaviour.hang_after_tokens = engine.num_tokens + 1
    lines = []
    with app.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            lines.append(line)
            if line:
                engine.behaviour.hang_after_tokens = engine.num_tokens + 1
    engine.behaviour.hang_after_tokens = None
    return parsed(lines)


def parsed(lines: list[str]) -> list[dict[str, Any]]:
    payloads = [line.removeprefix("data: ") for line in lines if line]
    assert payloads[-1] == "[DONE]"
    return [json.loads(payload) for payload in payloads[:-1]]


def test_one_text_gives_one_object_with_its_meta_info(app: App) -> None:
    body = {"text": "Hello there", "rid": "mine", "sampling_params": {"max_new_tokens": 6}}
    answer = app.http.post("/generate", json=body).json()
    num_prompt = len(app.services.require_tokenizer().encode("Hello there"))
    assert answer["text"]
    assert len(answer["output_ids"]) == 6
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 6},
        "prompt_tokens": num_prompt,
        "completion_tokens": 6,
        "cached_tokens": 1,
        "spec_verify_ct": 3,
        "spec_accept_length": 2.0,
        "spec_steps": [[3, 1, 2]] * 3,
    }


def test_token_ids_go_in_and_come_out(app: App) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}}
    answer = app.http.post("/generate", json=body).json()
    assert answer["output_ids"] == [5, 6, 7, 5]


def test_streamed_text_is_cumulative_and_ends_with_done(app: App) -> None:
    body = {"text": "one two three", "sampling_params": {"max_new_tokens": 8}}
    whole = app.http.post("/generate", json=body).json()
    events = events_of_every_step(app, body)
    assert len(events) == 4
    for earlier, later in itertools.pairwise(events):
        assert later["text"].startswith(earlier["text"])
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_a_stream_has_the_ids_of_tokens_that_are_not_shown(app: App) -> None:
    app.engine.behaviour.script = [40, EOS, EOS, EOS, EOS, EOS, 41]
    events = events_of_every_step(app, {"text": "x", "sampling_params": {"max_new_tokens": 7, "ignore_eos": True}})
    text = app.services.require_tokenizer().token_text
    assert len(events) == 4
    assert events[1]["text"] == text(40)
    assert events[1]["output_ids"] == [40, EOS, EOS, EOS]
    assert events[-1]["text"] == text(40) + text(41)


def test_a_batch_gives_a_list_with_the_parameters_of_each(app: App) -> None:
    params = [{"max_new_tokens": 2}, {"max_new_tokens": 5}]
    body = {"input_ids": [[5, 6], [7]], "sampling_params": params, "rid": ["a", "b"]}
    first, second = app.http.post("/generate", json=body).json()
    assert (first["output_ids"], second["output_ids"]) == ([5, 6], [7] * 5)
    assert (first["meta_info"]["id"], second["meta_info"]["id"]) == ("a", "b")


def test_every_prompt_of_a_batch_keeps_its_stop_token_or_not(app: App) -> None:
    app.engine.behaviour.script = [40]
    end = {"max_new_tokens": 4, "skip_special_tokens": False}
    params = [{**end, "no_stop_trim": keeps} for keeps in (True, False, True)]
    answers = app.http.post("/generate", json={"input_ids": [[5], [6], [7]], "sampling_params": params}).json()
    text = app.services.require_tokenizer().token_text
    assert [answer["text"] for answer in answers] == [text(40) + text(EOS), text(40), text(40) + text(EOS)]


def test_a_streamed_batch_says_which_prompt_each_event_belongs_to(app: App) -> None:
    body = {"input_ids": [[5, 6], [7]], "sampling_params": {"max_new_tokens": 6, "n": 2}, "stream": True}
    last = {event["index"]: event for event in events_of(app.http.post("/generate", json=body))}
    assert {index: event["output_ids"] for index, event in last.items()} == {
        0: [5, 6] * 3,
        1: [5, 6] * 3,
        2: [7] * 6,
        3: [7] * 6,
    }


def test_finish_reason_names_the_token_or_string_that_matched(make_app: AppFactory) -> None:
    app = make_app()
    app.engine.behaviour.script = app.services.require_tokenizer().encode("one two three four")
    params = {"max_new_tokens": 100}
    by_token = app.http.post("/generate", json={"text": "x", "sampling_params": params}).json()
    assert by_token["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    params["stop"] = "three"  # type: ignore[assignment]
    by_string = app.http.post("/generate", json={"text": "x", "sampling_params": params}).json()
    assert by_string["meta_info"]["finish_reason"] == {"type": "stop", "matched": "three"}
    assert by_string["text"] == "one two "


def test_logprobs_are_triples_of_logprob_id_and_text(app: App) -> None:
    body = {
        "input_ids": [40, 41, 42],
        "sampling_params": {"max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    text_of = app.services.require_tokenizer().token_text
    meta = app.http.post("/generate", json=body).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 40, text_of(40)], [-0.5, 41, text_of(41)]]
    assert meta["input_token_logprobs"] == [[-0.5, 41, text_of(41)], [-0.5, 42, text_of(42)]]
    assert meta["output_top_logprobs"][0] == [[-0.5, 40, text_of(40)], [-1.5, 41, text_of(41)]]
    body |= {"return_text_in_logprobs": False, "logprob_start_len": -1}
    meta = app.http.post("/generate", json=body).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 40, None], [-0.5, 41, None]]
    assert meta["input_token_logprobs"] == []


def test_an_aborted_request_ends_with_reason_abort(make_app: AppFactory) -> None:
    app = make_app()
    app.engine.behaviour.step_seconds = 0.02
    body = {"text": "x", "rid": "r", "stream": True, "sampling_params": {"max_new_tokens": 400, "n": 2}}
    with app.http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert app.http.post("/abort_request", json={"rid": "r"}).json() == {"success": True}
        payloads = [line.removeprefix("data: ") for line in lines if line]
    last = {event["index"]: event for event in map(json.loads, payloads[:-1])}
    assert {e["meta_info"]["finish_reason"]["type"] for e in last.values()} == {"abort"}
    assert payloads[-1] == "[DONE]"
    app.wait_until_idle()


def test_a_prompt_of_a_batch_is_aborted_by_its_name_with_all_its_choices(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.01))
    params = {"max_new_tokens": 100, "n": 2}
    body = {"text": ["x", "y"], "rid": ["a", "b"], "stream": True, "sampling_params": params}
    with app.http.stream("POST", "/generate", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        first = [next(lines)]
        app.http.post("/abort_request", json={"rid": "a"})
        events = [json.loads(line.removeprefix("data: ")) for line in [*first, *lines][:-1]]
    reasons = {event["index"]: event["meta_info"]["finish_reason"] for event in events}
    assert {index: reason["type"] for index, reason in reasons.items()} == {
        0: "abort",
        1: "abort",
        2: "length",
        3: "length",
    }


def test_a_name_can_be_taken_again_as_soon_as_its_request_is_over(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.03))
    one, other = (
        app.services.require_tokenizer().encode(text, add_special_tokens=False) for text in ("one two", "six")
    )
    params = {"max_new_tokens": 200, "ignore_eos": True}
    for _ in range(3):
        body = {"input_ids": one, "rid": "r", "sampling_params": {**params, "stop": "two"}}
        assert app.http.post("/generate", json=body).json()["text"] == "one "
        body = {"input_ids": other, "rid": "r", "sampling_params": {**params, "max_new_tokens": 4}}
        answer = app.http.post("/generate", json=body).json()
        assert answer["output_ids"] == (other * 4)[:4]
        assert answer["meta_info"]["finish_reason"]["type"] == "length"


def test_without_a_tokenizer_only_token_ids_are_served(make_app: AppFactory) -> None:
    app = make_app("--skip-tokenizer-init", with_tokenizer=False)
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3}}
    assert app.http.post("/generate", json=body).json()["output_ids"] == [5, 6, 5]
    events = events_of_every_step(app, body)
    assert [event["output_ids"] for event in events] == [[5, 6], [5, 6, 5]]
    for path, wrong in (
        ("/generate", {"text": "x"}),
        ("/generate", {**body, "sampling_params": {"stop": "x"}}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        response = app.http.post(path, json=wrong)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "no_tokenizer"
        assert (path == "/generate") == ("/generate" not in error["message"])


@pytest.mark.parametrize("text", ["Hello there", "naïve 東京 🙂", "x" * 20_000])
def test_tokenize_and_detokenize_are_inverse(app: App, text: str) -> None:
    found = app.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] > 0
    assert app.http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"text": text}


@pytest.mark.parametrize("with_tools", [False, True])
def test_messages_are_tokenized_as_a_chat_request_would(app: App, with_tools: bool) -> None:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    if with_tools:
        fields["tools"] = [{"type": "function", "function": {"name": "get_time"}}]
    found = app.http.post("/tokenize", json=fields).json()
    assert app.http.post("/v1/chat/completions", json={**fields, "max_tokens": 1}).status_code == 200
    assert found["tokens"] == app.added[-1].input_ids
    assert found["count"] == len(found["tokens"])
    assert ("get_time" in app.services.require_tokenizer().decode(found["tokens"])) == with_tools


def test_tokenize_and_detokenize_take_batches(app: App) -> None:
    found = app.http.post("/tokenize", json={"prompt": ["a b", "c"]}).json()
    assert found["count"] == [len(ids) for ids in found["tokens"]]
    assert app.http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"text": ["a b", "c"]}
