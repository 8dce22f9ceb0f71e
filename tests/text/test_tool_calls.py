from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.text.tool_calls import MAX_LAYOUT_NEWLINES, ContentText, ToolCallParser, ToolCallPart

from tests.text.chunks import cut, cuts, mixes

TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "limit": {"type": "integer"},
                    "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]

Joined = tuple[str, list[tuple[str, str]]]


def parts(pieces: list[str]) -> list[ContentText | ToolCallPart]:
    parser = ToolCallParser(TOOLS)
    return [part for n, piece in enumerate(pieces, start=1) for part in parser.push(piece, n == len(pieces))]


def joined(pieces: list[str]) -> Joined:
    """(content, calls as (name, arguments)); checks the order of the parts of each call on the way."""
    content: list[str] = []
    calls: list[list[str]] = []
    is_open = False
    for part in parts(pieces):
        if isinstance(part, ContentText):
            assert part.text
            assert not is_open
            content.append(part.text)
        elif part.name is not None:
            assert not is_open
            assert (part.index, part.arguments, part.is_last) == (len(calls), "", False)
            calls.append([part.name])
            is_open = True
        else:
            assert is_open
            assert part.index == len(calls) - 1
            calls[-1].append(part.arguments)
            is_open = not part.is_last
    assert not is_open
    return "".join(content), [(call[0], "".join(call[1:])) for call in calls]


def call(name: str, *arguments: tuple[str, str], newline: str = "\n") -> str:
    """A call as the models write it: with newlines (4.5, 4.6) or without (4.7)."""
    pairs = [f"<arg_key>{k}</arg_key>{newline}<arg_value>{v}</arg_value>{newline}" for k, v in arguments]
    return f"<tool_call>{name}{newline}{''.join(pairs)}</tool_call>"


def check(text: str, content: str, *calls: tuple[str, Any]) -> None:
    """The whole text at once, and character by character."""
    for pieces in ([text], list(text)):
        found_content, found = joined(pieces)
        assert found_content == content
        assert [(name, json.loads(arguments)) for name, arguments in found] == list(calls)


@pytest.mark.parametrize("newline", ["\n", ""])
def test_a_call_with_arguments_of_several_types(newline: str) -> None:
    text = call("find", ("text", "123"), ("limit", "5"), ("tags", '["a", 1]'), newline=newline)
    check(text, "", ("find", {"text": "123", "limit": 5, "tags": ["a", 1]}))


@pytest.mark.parametrize(
    "text", ["<tool_call>now</tool_call>", "<tool_call>now\n</tool_call>", "<tool_call>\nnow\n</tool_call>"]
)
def test_a_call_without_arguments(text: str) -> None:
    assert joined([text]) == ("", [("now", "{}")])


def test_content_before_between_and_after_calls() -> None:
    text = f"Let me look.\n\n{call('now')}\nand\n{call('find', ('text', 'x'))}\nDone.\n"
    check(text, "Let me look.andDone.\n", ("now", {}), ("find", {"text": "x"}))


def test_newlines_between_calls_are_no_content() -> None:
    check(f"{call('now')}\n\n{call('now')}\n", "", ("now", {}), ("now", {}))


@pytest.mark.parametrize(
    "value",
    [
        "a < b",
        "</arg_valu",
        "<tool_call>x</tool_call>",
        "<arg_key>",
        '"\\',
        " \n padded\n ",
        "",
        "日本🦊",
        "\u2028",
        "{}",
    ],
)
def test_a_string_argument_is_the_text_between_the_tags(value: str) -> None:
    check(call("find", ("text", value)), "", ("find", {"text": value}))


def test_an_unknown_tool_is_called_all_the_same() -> None:
    check(call("other", ("a", "1"), ("b", "x y")), "", ("other", {"a": 1, "b": "x y"}))


def test_the_name_comes_first_and_alone_and_strings_stream() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.push("Hi <tool_", False) == [ContentText("Hi ")]
    assert parser.push("call>find\n", False) == []
    assert parser.push("<arg_key>", False) == [ToolCallPart(0, name="find")]
    assert parser.push("text</arg_key>\n<arg_value>on", False) == [ToolCallPart(0, arguments='{"text": "on')]
    assert parser.push('e "two"</arg', False) == [ToolCallPart(0, arguments='e \\"two\\"')]
    assert parser.push("_value>\n<arg_key>limit</arg_key><arg_value>1", False) == [ToolCallPart(0, arguments='"')]
    assert parser.push("0</arg_value>", False) == [ToolCallPart(0, arguments=', "limit": 10')]
    assert parser.push("</tool_call>", False) == [ToolCallPart(0, arguments="}", is_last=True)]
    assert parser.num_calls == 1
    assert parser.push("", True) == []


def test_several_calls_in_one_push() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.push(call("now") + call("find", ("limit", "1")), True) == [
        ToolCallPart(0, name="now"),
        ToolCallPart(0, arguments="{}", is_last=True),
        ToolCallPart(1, name="find"),
        ToolCallPart(1, arguments='{"limit": 1}', is_last=True),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> like this",
        "the `<tool_call>` tag",
        "<tool_call></tool_call>",
        "<tool_call>\n<arg_key>a</arg_key>",
        "<tool_call>two words</tool_call>",
        "<tool_call>" + "x" * 300 + "</tool_call>",
        "a\n\n<tool_call>fin",
        "a\n<tool_call>find\n<arg_ke",
        "<tool_call>",
        "<tool_ca",
        "1 < 2\n",
        "</tool_call>\n",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    check(text, text)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<tool_call>find\n<arg_key>text</arg_key><arg_value>one tw", {"text": "one tw"}),
        ("<tool_call>find\n<arg_key>text</arg_key><arg_value>one</arg_val", {"text": "one</arg_val"}),
        ("<tool_call>find\n<arg_key>limit</arg_key><arg_value>12", {}),
        ("<tool_call>find\n<arg_key>limit</arg_key><arg_value>12</arg_value>", {"limit": 12}),
        ("<tool_call>find\n<arg_key>limit</arg_key>", {}),
        ("<tool_call>find\n<arg_key>lim", {}),
        ("<tool_call>find<arg_key>limit</arg_key><arg_value>1</arg_value></tool", {"limit": 1}),
    ],
)
def test_a_call_that_is_cut_off_is_closed(text: str, arguments: dict[str, Any]) -> None:
    check(text, "", ("find", arguments))


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("what<arg_key>limit</arg_key>is<arg_value>1</arg_value>this", {"limit": 1}),
        ("<arg_key>limit<arg_value>1</arg_value>", {"limit": 1}),
        ("<arg_key>text</arg_key><arg_key>limit</arg_key><arg_value>1</arg_value>", {"limit": 1}),
        ("<arg_key>limit</arg_key>", {}),
        ("<arg_key>limit", {}),
        ("<arg_key>\nlimit\n</arg_key><arg_value>1</arg_value>", {"limit": 1}),
        ("<arg_key>limit</arg_key><arg_value>1</arg_value>" * 2, {"limit": 1}),
        (
            "<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>text</arg_key><arg_value>b</arg_value>",
            {"text": "a"},
        ),
    ],
)
def test_a_call_with_misplaced_tags_keeps_what_is_clear(inside: str, arguments: dict[str, Any]) -> None:
    text = f"<tool_call>find\n<arg_key>tags</arg_key><arg_value>[]</arg_value>{inside}</tool_call>"
    check(text, "", ("find", {"tags": [], **arguments}))


def test_a_new_call_closes_an_open_one() -> None:
    text = "<tool_call>find<arg_key>limit</arg_key><arg_value>1</arg_value>\n<tool_call>now</tool_call>"
    check(text, "", ("find", {"limit": 1}), ("now", {}))
    check("<tool_call>find<arg_key>limit</arg_key><tool_call>now</tool_call>", "", ("find", {}), ("now", {}))
    check("<tool_call><tool_call>now</tool_call>", "<tool_call>", ("now", {}))


@settings(deadline=None)
@given(text=mixes(*TAGS, "find", "now", "text", "limit", "12", "\n"), cuts=cuts())
def test_the_result_does_not_depend_on_how_the_text_arrives(text: str, cuts: list[int]) -> None:
    assert joined(cut(text, cuts)) == joined([text])


@settings(deadline=None)
@given(
    text=mixes(call("find", ("text", "a<b\n"), ("limit", "1")), call("now", newline=""), "<tool_call>find<arg_key>"),
    cuts=cuts(),
)
def test_arguments_are_always_json_with_each_key_once(text: str, cuts: list[int]) -> None:
    _, calls = joined(cut(text, cuts))
    for _, arguments in calls:
        pairs = json.loads(arguments, object_pairs_hook=list)
        assert len({key for key, _ in pairs}) == len(pairs)


arguments_of_find = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text() | mixes(*TAGS).filter(lambda text: "</arg_value>" not in text),
        "limit": st.integers(-(10**20), 10**20),
        "tags": st.lists(st.text("ab<é", max_size=4), max_size=3),
    },
)


@settings(deadline=None)
@given(
    said=st.lists(st.tuples(st.text("a<é ", max_size=5), arguments_of_find), max_size=4),
    newline=st.sampled_from(["\n", ""]),
    cuts=cuts(),
)
def test_what_the_model_says_in_either_format_comes_back(
    said: list[tuple[str, dict[str, Any]]], newline: str, cuts: list[int]
) -> None:
    output = ""
    for text, arguments in said:
        values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
        output += text + newline + call("find", *values.items(), newline=newline) + newline
    content, calls = joined(cut(output, cuts))
    assert content == "".join(text for text, _ in said)
    assert [json.loads(arguments) for _, arguments in calls] == [arguments for _, arguments in said]


def test_newlines_without_end_do_not_pile_up() -> None:
    parser = ToolCallParser(TOOLS)
    shown = "".join(part.text for _ in range(100) for part in parser.push("\n" * 7, False))  # type: ignore[union-attr]
    assert len(shown) == 700 - MAX_LAYOUT_NEWLINES
    assert parser.push("<tool_", False) == []
    assert parser.push("bag>", True) == [ContentText("\n" * MAX_LAYOUT_NEWLINES + "<tool_bag>")]


@settings(deadline=None)
@given(num_newlines=st.integers(0, 3 * MAX_LAYOUT_NEWLINES), cuts=cuts())
def test_the_same_number_of_newlines_is_layout_however_they_arrive(num_newlines: int, cuts: list[int]) -> None:
    text = "a" + "\n" * num_newlines + call("now")
    kept = max(0, num_newlines - MAX_LAYOUT_NEWLINES)
    assert joined(cut(text, cuts)) == ("a" + "\n" * kept, [("now", "{}")])
