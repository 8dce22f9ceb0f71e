"""``/v1/completions`` through the openai client."""

from __future__ import annotations

import itertools

import pytest

from tests.server.conftest import MODEL, App, AppFactory
from tests.server.fake_engine import Behaviour


def test_a_completion_ends_at_max_tokens_and_counts_its_tokens(app: App) -> None:
    answer = app.openai.completions.create(model=MODEL, prompt="Hello there", max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_usage_splits_draft_tokens_into_accepted_and_rejected(app: App) -> None:
    answer = app.openai.completions.create(model=MODEL, prompt="Hello there", max_tokens=6)
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (3, 6)


def test_sixteen_tokens_is_the_default_length(app: App) -> None:
    answer = app.openai.completions.create(model=MODEL, prompt="Hello there")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_streamed_text_equals_the_text_in_one_piece(app: App) -> None:
    whole = app.openai.completions.create(model=MODEL, prompt="Hello there, world", max_tokens=9)
    chunks = list(
        app.openai.completions.create(
            model=MODEL, prompt="Hello there, world", max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_batch_with_n_gives_every_prompt_its_choices_in_order(app: App) -> None:
    prompts = ["one two three", "red green blue"]
    answer = app.openai.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=40, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.text.startswith(prompts[choice.index // 2])


def test_choices_of_one_prompt_get_consecutive_seeds(make_app: AppFactory) -> None:
    app = make_app()
    app.openai.completions.create(model=MODEL, prompt="x", n=3, seed=2**63 - 1, max_tokens=2)
    seeds = [message.sampling.seed for message in app.added]
    assert seeds == [2**63 - 1, 0, 1]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]], [[5], [6, 7]], ["a", [5]]])
def test_prompts_may_be_token_ids(app: App, prompt: object) -> None:
    answer = app.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert answer.status_code == 200
    assert len(answer.json()["choices"]) == (1 if isinstance(prompt[0], int) else len(prompt))  # type: ignore[index, arg-type]


def test_a_stop_string_ends_the_text_before_it_and_frees_the_engine(make_app: AppFactory) -> None:
    app = make_app()
    tokenizer = app.services.require_tokenizer()
    script = tokenizer.encode("one two three four five six seven")
    app.engine.behaviour.script = script * 20
    for stream in (False, True):
        body = {"prompt": "x", "max_tokens": 400, "stop": ["four"], "stream": stream}
        text, reason = complete(app, body)
        assert text == "one two three "
        assert reason == "stop"
    app.wait_until_idle()
    assert app.engine.num_tokens < 100


def test_the_stop_string_stays_when_asked(make_app: AppFactory) -> None:
    app = make_app()
    app.engine.behaviour.script = app.services.require_tokenizer().encode("one two three four five six")
    body = {"prompt": "x", "max_tokens": 400, "stop": "three", "include_stop_str_in_output": True}
    assert complete(app, body) == ("one two three", "stop")


def test_an_eos_token_ends_with_reason_stop(make_app: AppFactory) -> None:
    app = make_app()
    app.engine.behaviour.script = app.services.require_tokenizer().encode("one two")
    assert complete(app, {"prompt": "x", "max_tokens": 400}) == ("one two", "stop")


def test_logprobs_and_echo_cover_the_prompt(app: App) -> None:
    ids = app.services.require_tokenizer().encode("Hello there")
    answer = app.openai.completions.create(model=MODEL, prompt="Hello there", max_tokens=2, echo=True, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert len(found.tokens) == len(ids) + 2
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == [-0.5] * (len(ids) + 1)
    assert found.top_logprobs[0] is None
    assert len(found.top_logprobs[1]) == 2
    text = answer.choices[0].text
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_go_on_from_token_to_token_however_the_text_comes(app: App, echo: bool, stream: bool) -> None:
    tokenizer = app.services.require_tokenizer()
    app.engine.behaviour.script = tokenizer.encode("one 日本 two three four five")
    app.engine.behaviour.tokens_per_step = 3
    fields = {"model": MODEL, "prompt": "東 x", "max_tokens": 30, "logprobs": 0, "stop": "four", "echo": echo}
    if stream:
        chunks = list(app.openai.completions.create(**fields, stream=True))  # type: ignore[call-overload]
    else:
        chunks = [app.openai.completions.create(**fields)]  # type: ignore[call-overload]
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    tokens = [token for logprobs in found for token in logprobs.tokens]
    ends = list(itertools.accumulate(map(len, tokens), initial=0))
    assert [offset for logprobs in found for offset in logprobs.text_offset] == ends[:-1]
    assert len(tokens) > 10


def test_zero_tokens_with_echo_scores_the_prompt_alone(app: App) -> None:
    answer = app.openai.completions.create(model=MODEL, prompt="Hello there", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "Hello there"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs is not None
    assert "".join(answer.choices[0].logprobs.tokens or []) == "Hello there"


def test_sampling_parameters_reach_the_engine(make_app: AppFactory) -> None:
    app = make_app()
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "logit_bias": {"5": -100.0},
        "stop_token_ids": [9],
        "ignore_eos": True,
        "seed": 42,
    }
    body = {"prompt": [1, 2], "max_tokens": 4, "min_tokens": 2, "priority": 3, "cache_salt": "s", **fields}
    assert app.http.post("/v1/completions", json=body).status_code == 200
    (added,) = app.added
    expected = {**fields, "logit_bias": {5: -100.0}, "stop_token_ids": (9,), "max_new_tokens": 4, "min_new_tokens": 2}
    assert {name: getattr(added.sampling, name) for name in expected} == expected
    assert (added.priority, added.cache_salt, added.input_ids) == (3, "s", [1, 2])


def complete(app: App, body: dict[str, object]) -> tuple[str, str | None]:
    """Text and finish reason of one completion, streamed or not."""
    if not body.get("stream"):
        choice = app.http.post("/v1/completions", json=body).json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    chunks = [chunk.choices[0] for chunk in app.openai.completions.create(model=MODEL, **body)]  # type: ignore[call-overload]
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


def test_a_larger_stream_interval_sends_fewer_chunks(make_app: AppFactory) -> None:
    def num_chunks(*flags: str) -> int:
        app = make_app(*flags, behaviour=Behaviour(step_seconds=0.003))
        stream = app.openai.completions.create(model=MODEL, prompt="one two three four", max_tokens=64, stream=True)
        return len(list(stream))

    assert num_chunks() > 16
    assert num_chunks("--stream-interval", "16") <= 6
