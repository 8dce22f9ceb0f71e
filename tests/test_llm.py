"""The offline API on the embedded model: what a user of Python sees, and what the model was trained to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from nextn import LLM, SamplingParams
from nextn.demo.quiz import held_out_items
from nextn.errors import CheckpointError, ConfigError, RequestError
from nextn.scheduler.scheduler import Decision, Extend
from nextn.speculative.cycle import SpeculativeCycle

GREEDY = SamplingParams(temperature=0, max_new_tokens=64)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture(scope="module")
def open_prompts() -> list[str]:
    return [item.prompt for item in held_out_items(seed=11, num_quiz=12, num_tools=6, num_open=12)]


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM) -> Iterator[None]:
    yield
    llm.engine.scheduler.check()
    assert not llm.engine.has_work
    pages = llm.engine.scheduler.pages
    assert pages.num_available == pages.num_pages


def test_chat_answers_a_question(llm: LLM) -> None:
    out = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert "Paris" in out.text
    assert out.finish_reason == "stop"
    assert out.meta_info["completion_tokens"] == len(out.output_ids)


def test_text_and_token_ids_are_the_same_prompt(llm: LLM, open_prompts: list[str]) -> None:
    text = open_prompts[0]
    ids = llm.tokenizer.encode(text)
    (from_text,) = llm.generate(text, GREEDY)
    (from_ids,) = llm.generate([ids], GREEDY)
    (from_one_list,) = llm.generate(ids, GREEDY)
    assert from_text.output_ids == from_ids.output_ids == from_one_list.output_ids
    assert from_text.text == llm.tokenizer.decode(from_text.output_ids)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_greedy_text_is_the_same_with_any_number_of_drafts(llm: LLM, open_prompts: list[str], num_steps: int) -> None:
    other = LLM(speculative_num_steps=num_steps)
    expected = [out.output_ids for out in llm.generate(open_prompts, GREEDY)]
    assert [out.output_ids for out in other.generate(open_prompts, GREEDY)] == expected
    assert [llm.generate(prompt, GREEDY)[0].output_ids for prompt in open_prompts[:6]] == expected[:6]


def test_drafts_are_accepted_as_the_model_card_says(open_prompts: list[str]) -> None:
    llm = LLM(speculative_num_steps=3)
    llm.generate(open_prompts, SamplingParams(temperature=0, max_new_tokens=128))
    stats = llm.stats
    assert stats.accept_length >= 2.4
    rates = [a / d for a, d in zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)]
    assert rates == sorted(rates, reverse=True)
    assert rates[2] > 0.3, "the third draft is worth something only if the head carries its own normed state"


def test_the_model_knows_what_it_was_trained_on(llm: LLM) -> None:
    items = held_out_items(seed=5, num_quiz=80, num_tools=40, num_open=0)
    outputs = llm.generate([item.prompt for item in items], SamplingParams(temperature=0, max_new_tokens=192))
    right: dict[str, list[bool]] = {}
    for item, out in zip(items, outputs, strict=True):
        right.setdefault(item.part, []).append(item.is_right(out.text))
    shares = {part: sum(found) / len(found) for part, found in right.items()}
    # The card's figures are over more prompts; here a share may be a few prompts lower.
    assert all(share >= 0.85 for share in shares.values()), shares


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = llm.chat(messages, GREEDY)
    stop = whole.text[len(whole.text) // 2 :][:4]
    cut = llm.chat(messages, SamplingParams(temperature=0, max_new_tokens=64, stop=stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.meta_info["matched_stop"]) == ("stop", stop)
    assert cut.output_ids == whole.output_ids[: len(cut.output_ids)]
    for one in (whole, cut):
        assert sum(emitted for _, _, emitted in one.meta_info["spec_steps"]) == one.meta_info["completion_tokens"]


def test_logprobs_belong_to_the_tokens(llm: LLM) -> None:
    out = llm.chat(
        [{"role": "user", "content": "Hello!"}], SamplingParams(temperature=0, max_new_tokens=16, logprobs=2)
    )
    assert out.logprobs is not None
    assert [entry.token_id for entry in out.logprobs] == out.output_ids
    assert all(entry.top[0][0] == entry.token_id for entry in out.logprobs)


def test_a_seed_repeats_and_another_differs(llm: LLM, open_prompts: list[str]) -> None:
    def sample(seed: int) -> list[int]:
        return llm.generate(
            open_prompts[3], SamplingParams(temperature=1.5, max_new_tokens=48, seed=seed, ignore_eos=True)
        )[0].output_ids

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_more_prompts_than_the_queue_holds_are_all_served(open_prompts: list[str]) -> None:
    small = LLM(max_queued_requests=2, max_running_requests=2)
    outputs = small.generate(open_prompts[:9], SamplingParams(temperature=0, max_new_tokens=4))
    assert len(outputs) == 9


def test_each_prompt_may_have_its_own_parameters(llm: LLM, open_prompts: list[str]) -> None:
    params = [SamplingParams(temperature=0, max_new_tokens=n, ignore_eos=True) for n in (1, 5, 9)]
    assert [len(out.output_ids) for out in llm.generate(open_prompts[:3], params)] == [1, 5, 9]


def test_bad_input_is_refused_and_loses_nothing(llm: LLM, open_prompts: list[str]) -> None:
    with pytest.raises(RequestError, match="leaves no room"):
        llm.generate([open_prompts[0], [1] * 5000])
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate("hi", [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[]])
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM("./nowhere")
    with pytest.raises(ConfigError, match="page"):
        LLM(page_size=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_generate_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    expected = llm.generate("hi", GREEDY)[0].output_ids
    cycle, calls = llm.engine._cycle, itertools.count()

    def run(extends: list[Extend]) -> list[Decision]:
        decisions = SpeculativeCycle.run(cycle, extends)
        if next(calls) == 2:
            raise error
        return decisions

    with monkeypatch.context() as patched:
        patched.setattr(cycle, "run", run)
        with pytest.raises(error):
            llm.generate(["hi", "you"], GREEDY)
    assert not llm.engine.has_work
    assert llm.generate("hi", GREEDY)[0].output_ids == expected


BAD_PARAMETERS = [
    ("max_new_tokens", 0),
    ("min_new_tokens", -3),
    ("min_new_tokens", 65),
    ("temperature", -1.0),
    ("temperature", math.nan),
    ("top_k", -5),
    ("top_p", 0.0),
    ("top_p", math.nan),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-40),
    ("presence_penalty", math.inf),
    ("frequency_penalty", -math.inf),
    ("logit_bias", {5: math.inf}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {-1: 1.0}),
    ("stop_token_ids", [10**6]),
    ("stop", ["a", ""]),
    ("seed", 2**64),
    ("logprobs", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMETERS)
def test_a_parameter_out_of_range_is_refused_by_name(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}: (found|token id) "):
        llm.generate(["hi", "you"], [GREEDY, replace(GREEDY, **{name: value})])
    assert llm.generate("hi", replace(GREEDY, max_new_tokens=2))[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.0),
        ("top_k", -1),
        ("top_k", 2**31 - 1),
        ("min_p", 1.0),
        ("repetition_penalty", 1e-6),
        ("repetition_penalty", 2.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("logit_bias", {5: -100.0, 6: 100.0}),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("logprobs", 20),
    ],
)
def test_the_last_values_of_a_range_are_served(llm: LLM, name: str, value: Any) -> None:
    params = replace(SamplingParams(max_new_tokens=4, ignore_eos=True), **{name: value})
    assert len(llm.generate("hi", params)[0].output_ids) == 4
