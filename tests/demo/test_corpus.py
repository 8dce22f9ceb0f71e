"""The corpus is a fixed function of its seed, and what the quiz asks is not in it."""

from random import Random

import pytest
from nextn.demo.corpus import lessons
from nextn.demo.corpus.split import is_held_out
from nextn.demo.corpus.stream import document, draw
from nextn.demo.quiz import held_out_items, parse_call


def _text(seed: int, index: int) -> str:
    return "".join(span.text for span in document(seed, index))


def test_the_same_seed_and_number_give_the_same_document():
    assert [_text(3, index) for index in range(100)] == [_text(3, index) for index in range(100)]


def test_another_seed_gives_other_documents():
    assert [_text(3, index) for index in range(20)] != [_text(4, index) for index in range(20)]


def test_no_held_out_prompt_occurs_in_training():
    training = "\n".join(_text(0, index) for index in range(4000))
    items = held_out_items(seed=0, num_quiz=200, num_tools=50, num_open=50)
    assert len({item.prompt for item in items}) == len(items) > 250
    for item in items:
        turn = item.prompt.removeprefix("[gMASK]<sop>").split("<|assistant|>")[0]
        assert turn + "<|assistant|>" not in training, turn


def test_about_a_twentieth_is_held_out():
    share = sum(is_held_out(f"capital/{index}") for index in range(20_000)) / 20_000
    assert 0.04 < share < 0.06


@pytest.mark.parametrize("held_out", [True, False])
def test_a_draw_lies_on_the_asked_side(held_out):
    rng = Random(0)
    for make, _ in lessons.QUIZ_KINDS.values():
        assert is_held_out(draw(make, rng, held_out).key) == held_out


@pytest.mark.parametrize(("a", "b"), [(47, 38), (5, 4), (8, 7), (90, 9), (99, 99), (10, 10), (73, 8)])
def test_spoken_steps_end_in_the_right_number(a, b):
    assert lessons.addition_steps(a, b).endswith(f"So {a + b}.")
    assert lessons.subtraction_steps(max(a, b), min(a, b)).endswith(f"So {abs(a - b)}.")


def test_arithmetic_lessons_are_right():
    rng = Random(1)
    for _ in range(300):
        left, right = lessons.arithmetic(rng).answer.rstrip(".").split(" = ")
        assert eval(left.replace("/", "//")) == int(right)


def test_a_quiz_marks_its_own_expected_answers_as_right_and_others_as_wrong():
    for item in held_out_items(seed=1, num_quiz=30, num_tools=10, num_open=10):
        before = "\n<think>because</think>\n" if item.thinking else "\n"
        if isinstance(item.expected, str):
            text = item.expected
        else:
            pairs = "".join(
                f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
                for key, value in item.expected["arguments"].items()
            )
            text = f"<tool_call>{item.expected['name']}\n{pairs}</tool_call>"
            assert not item.is_right(before + text.replace("</tool_call>", ""))
        assert item.is_right(before + text)
        assert not item.is_right(before + "something else")
        if item.thinking:
            assert not item.is_right("\n" + text)


def test_a_call_with_text_around_it_is_not_well_formed():
    call = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
    assert parse_call(call) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert parse_call("Sure! " + call) is None
    assert parse_call(call.replace("\n<arg_value>", "<arg_value>")) is None
