from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.text.reasoning import MAX_LAYOUT_NEWLINES, ReasoningDelta, ReasoningParser, starts_inside_reasoning

from tests.text.chunks import cut, cuts, mixes


def split(pieces: list[str], starts_inside: bool = False) -> tuple[str, str]:
    """(reasoning, content) of an output that arrives in pieces."""
    parser = ReasoningParser(starts_inside)
    deltas = [parser.push(piece, number == len(pieces)) for number, piece in enumerate(pieces, start=1)]
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("\n<think>\nhm, 1 < 2\n</think>\n\nYes.\n", ("hm, 1 < 2", "Yes.\n")),
        ("<think>hm</think>Yes.", ("hm", "Yes.")),
        ("<think></think>\nYes.", ("", "Yes.")),
        ("\nYes <think>no</think>", ("", "Yes <think>no</think>")),
        ("<thin", ("", "<thin")),
        ("<think>a\n\nb\n</thi", ("a\n\nb\n</thi", "")),
        ("<think>a <think> b</think>c</think>", ("a <think> b", "c</think>")),
        ("<think>I call\n<tool_call>f\n</tool_call>", ("I call", "<tool_call>f\n</tool_call>")),
        ("\n\n", ("", "")),
        ("", ("", "")),
    ],
)
def test_what_the_model_opens_itself(output: str, expected: tuple[str, str]) -> None:
    assert split([output]) == expected
    assert split(list(output) or [""]) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("\nhm\n</think>\nYes.", ("hm", "Yes.")),
        ("hm", ("hm", "")),
        ("<think>hm</think>Yes.", ("hm", "Yes.")),
        ("</think>Yes.", ("", "Yes.")),
        ("hm<tool_call>f</tool_call>", ("hm", "<tool_call>f</tool_call>")),
    ],
)
def test_what_the_prompt_has_opened(output: str, expected: tuple[str, str]) -> None:
    assert split([output], starts_inside=True) == expected
    assert split(list(output), starts_inside=True) == expected


@settings(deadline=None)
@given(text=mixes("<think>", "</think>", "<tool_call>", "</tool_call>", "\n"), cuts=cuts(), starts_inside=st.booleans())
def test_the_result_does_not_depend_on_how_the_text_arrives(text: str, cuts: list[int], starts_inside: bool) -> None:
    assert split(cut(text, cuts), starts_inside) == split([text], starts_inside)


@settings(deadline=None)
@given(text=mixes("<think>", "</think>", "<tool_call>"), starts_inside=st.booleans())
def test_nothing_but_tags_and_newlines_is_lost(text: str, starts_inside: bool) -> None:
    reasoning, content = split([text], starts_inside)
    kept = (reasoning + content).replace("\n", "")
    lost = len(text.replace("\n", "")) - len(kept)
    assert lost in (0, len("<think>"), len("</think>"), len("<think></think>"))


@settings(deadline=None)
@given(
    reasoning=st.text("a<é \n/").map(lambda text: text.strip("\n")),
    content=st.text("a<é \n").map(lambda text: text.lstrip("\n")),
    newline=st.sampled_from(["\n", ""]),
    starts_inside=st.booleans(),
    cuts=cuts(),
)
def test_what_the_model_thinks_and_says_comes_back(
    reasoning: str, content: str, newline: str, starts_inside: bool, cuts: list[int]
) -> None:
    opening = "" if starts_inside else f"{newline}<think>"
    output = f"{opening}{newline}{reasoning}{newline}</think>{newline}{content}"
    assert split(cut(output, cuts), starts_inside) == (reasoning, content)


@settings(deadline=None)
@given(num_newlines=st.integers(0, 3 * MAX_LAYOUT_NEWLINES), cuts=cuts())
def test_newlines_without_end_do_not_pile_up(num_newlines: int, cuts: list[int]) -> None:
    text = "hm" + "\n" * num_newlines
    kept = "\n" * max(0, num_newlines - MAX_LAYOUT_NEWLINES)
    assert split(cut(text + "</think>Yes.", cuts), starts_inside=True) == ("hm" + kept, "Yes.")
    parser = ReasoningParser(starts_inside=True)
    assert "".join(parser.push(piece, False).reasoning for piece in cut(text, cuts)) == "hm" + kept


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    parser = ReasoningParser(starts_inside=True)
    assert parser.push("one ", False) == ReasoningDelta("one ", "")
    assert parser.push("two\n<", False) == ReasoningDelta("two", "")
    assert parser.push("b", False) == ReasoningDelta("\n<b", "")
    assert parser.push("\n</think>\n", False) == ReasoningDelta("", "")
    assert parser.push("\nyes\n", False) == ReasoningDelta("", "yes\n")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|assistant|>\n<think>", True),
        ("<|assistant|><think>\n", True),
        ("<|assistant|>", False),
        ("<|assistant|>\n<think></think>", False),
        ("<|assistant|></think>", False),
    ],
)
def test_the_prompts_end_tells_where_the_output_starts(prompt: str, expected: bool) -> None:
    assert starts_inside_reasoning(prompt) is expected
