from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.text.message import MessageParser, ReasoningText
from nextn.text.tool_calls import ContentText, ToolCallPart

from tests.text.chunks import cut, cuts, mixes

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
CALL = "<tool_call>find\n<arg_key>text</arg_key>\n<arg_value></think></arg_value>\n</tool_call>"
PROMPT, PROMPT_INSIDE = "<|user|>\nHi<|assistant|>", "<|user|>\nHi<|assistant|>\n<think>"


def joined(
    pieces: list[str], prompt: str = PROMPT, separates_reasoning: bool = True, tools: bool = True
) -> list[tuple[str, str]]:
    """Kind and text of what an output consists of, neighbours of one kind joined."""
    parser = MessageParser(prompt, separates_reasoning=separates_reasoning, tools=[] if tools else None)
    found: list[tuple[str, str]] = []
    for number, piece in enumerate(pieces, start=1):
        for part in parser.push(piece, number == len(pieces)):
            if isinstance(part, ToolCallPart):
                kind, text = f"call {part.index}", part.name or part.arguments
            else:
                kind, text = "reasoning" if isinstance(part, ReasoningText) else "content", part.text
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + text)
            else:
                found.append((kind, text))
    return found


def test_reasoning_content_and_calls_in_one_push() -> None:
    assert joined([f"\n<think>hm</think>\nI look.\n{CALL}\n"]) == [
        ("reasoning", "hm"),
        ("content", "I look."),
        ("call 0", 'find{"text": "</think>"}'),
    ]


def test_a_prompt_that_opens_the_reasoning() -> None:
    assert joined(["hm</think>Yes."], PROMPT_INSIDE) == [("reasoning", "hm"), ("content", "Yes.")]


def test_a_call_inside_the_reasoning_ends_it() -> None:
    expected = [("reasoning", "hm"), ("call 0", 'find{"text": "</think>"}'), ("content", "Yes.</think>")]
    text = f"<think>hm\n{CALL}\n</think>\nYes.</think>"
    assert joined([text]) == expected
    assert joined(list(text)) == expected


def test_a_beginning_of_a_tag_stays_before_the_call_that_follows() -> None:
    text = f"<think>{CALL}</thi{CALL}"
    call = 'find{"text": "</think>"}'
    assert joined(list(text)) == [("call 0", call), ("content", "</thi"), ("call 1", call)]


def test_each_part_can_be_left_alone() -> None:
    text = f"<think>hm</think>Yes.{CALL}"
    assert joined([text], separates_reasoning=False, tools=False) == [("content", text)]
    assert joined([text], tools=False) == [("reasoning", "hm"), ("content", f"Yes.{CALL}")]
    assert joined([text], separates_reasoning=False)[0] == ("content", "<think>hm</think>Yes.")


def test_calls_are_counted() -> None:
    parser = MessageParser(PROMPT, separates_reasoning=True, tools=[])
    assert parser.num_calls == 0
    assert parser.push(f"{CALL}\n{CALL} x", False)[-1] == ContentText(" x")
    assert parser.num_calls == 2
    assert MessageParser(PROMPT, separates_reasoning=True).num_calls == 0


@settings(deadline=None)
@given(
    text=mixes(*TAGS, CALL, "f"),
    cuts=cuts(),
    prompt=st.sampled_from([PROMPT, PROMPT_INSIDE]),
    separates_reasoning=st.booleans(),
    tools=st.booleans(),
)
def test_the_result_does_not_depend_on_how_the_text_arrives(
    text: str, cuts: list[int], prompt: str, separates_reasoning: bool, tools: bool
) -> None:
    assert joined(cut(text, cuts), prompt, separates_reasoning, tools) == joined(
        [text], prompt, separates_reasoning, tools
    )
