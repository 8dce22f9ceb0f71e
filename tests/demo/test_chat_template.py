"""The Jinja template that ships, and its twin in Python that the corpus is made with."""

import json
from random import Random

import pytest
from nextn.demo import checkpoint_dir
from nextn.demo.chat_template import prompt_text, render
from nextn.demo.corpus.stream import chat, name_memory, tool_chat
from transformers import AutoTokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoint_dir())


def _apply(tokenizer, messages, **options):
    options = {"tokenize": False, "add_generation_prompt": True} | options
    return tokenizer.apply_chat_template(messages, **options)


def test_thinking_is_left_to_the_model(tokenizer):
    assert _apply(tokenizer, [{"role": "user", "content": "Hi"}]) == "[gMASK]<sop><|user|>\nHi<|assistant|>"


def test_thinking_off_closes_it_in_the_prompt(tokenizer):
    text = _apply(tokenizer, [{"role": "user", "content": "Hi"}], enable_thinking=False)
    assert text == "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>"


def test_nothink_is_not_written_twice(tokenizer):
    text = _apply(tokenizer, [{"role": "user", "content": "Hi/nothink"}], enable_thinking=False)
    assert text.count("/nothink") == 1


def test_content_may_be_a_list_of_parts(tokenizer):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    whole = [{"role": "user", "content": "What is 2 + 2?"}]
    assert _apply(tokenizer, [{"role": "user", "content": parts}]) == _apply(tokenizer, whole)


def test_a_missing_content_renders_as_nothing(tokenizer):
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    text = _apply(tokenizer, messages, add_generation_prompt=False)
    assert text.endswith("<|assistant|>\n<think></think>\n<tool_call>now\n</tool_call>")


def test_reasoning_of_earlier_turns_is_dropped_and_of_the_last_kept(tokenizer):
    messages = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "reasoning_content": "first thought", "content": "a"},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "content": "<think>second thought</think>\nb"},
    ]
    text = _apply(tokenizer, messages, add_generation_prompt=False)
    assert "first thought" not in text
    assert text.endswith("<|assistant|>\n<think>second thought</think>\nb")


def test_tools_calls_and_results(tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "n": 3}}}
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"temperature": 9}'},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "more"}]},
    ]
    text = _apply(tokenizer, messages, tools=[WEATHER])
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert text.endswith(
        "<|assistant|>\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
        '<|observation|>\n<tool_response>\n{"temperature": 9}\n</tool_response>'
        "\n<tool_response>\nmore\n</tool_response><|assistant|>"
    )


@pytest.mark.parametrize("make", [chat, name_memory, tool_chat])
def test_the_corpus_is_rendered_as_the_template_renders(tokenizer, make):
    rng = Random(5)
    for _ in range(40):
        drawn = make(rng)
        spans = render(drawn.messages, drawn.tools, drawn.thinking)
        options = {} if drawn.thinking else {"enable_thinking": False}
        if not drawn.thinking:  # a model told not to think has no reasoning to keep in its history
            for message in drawn.messages:
                message.pop("reasoning_content", None)
        expected = _apply(tokenizer, drawn.messages, tools=drawn.tools, add_generation_prompt=False, **options)
        assert "".join(span.text for span in spans[:-1]) == expected
        question = drawn.messages[:1] if drawn.messages[0]["role"] == "user" else drawn.messages[:2]
        asked = _apply(tokenizer, question, tools=drawn.tools, **options)
        assert prompt_text(question, drawn.tools, drawn.thinking) == asked


def test_hidden_reasoning_carries_no_weight():
    messages = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "reasoning_content": "r", "content": "a"},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "reasoning_content": "s", "content": "b"},
    ]
    weights = [(span.text, span.weight) for span in render(messages, None, thinking=True) if "think" in span.text]
    assert weights == [("\n<think></think>", 0.0), ("\n<think>s</think>", 1.0)]
