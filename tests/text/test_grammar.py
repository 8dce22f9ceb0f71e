"""Outputs that grammars let through: what they say is read back by the parsers, and judged by a JSON schema library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from nextn.errors import RequestError
from nextn.text.grammar import MAX_GRAMMAR_LEN, Reasoning, Tags, ebnf_form, json_form, regex_form, whole_output
from nextn.text.grammar_compiler import compile_grammar
from nextn.text.message import MessageParser, ReasoningText
from nextn.text.tokenizer import Tokenizer
from nextn.text.tool_calls import ContentText, ToolCallPart
from nextn.text.tool_grammar import ToolGrammar

from tests.text.conftest import byte_level

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FIND = {
    "name": "find",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "unit": {"$ref": "#/$defs/unit"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "box": {"type": "array", "items": {"$ref": "#/$defs/side"}, "minItems": 2, "maxItems": 2},
            "free": {},
        },
        "required": ["unit", "days"],
        "$defs": {"unit": {"enum": ["km", "mile"]}, "side": {"type": "number", "minimum": 0, "maximum": 1}},
    },
}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": function} for function in (FIND, NOW)]


BACKEND = byte_level()
VOCABULARY = LLTokenizer(BACKEND.to_str(), eos_token=[BACKEND.token_to_id("<|endoftext|>")])


def check(grammar: str) -> None:
    compile_grammar(VOCABULARY, grammar)


@pytest.fixture
def vocabulary() -> LLTokenizer:
    return VOCABULARY


@pytest.fixture
def takes(tokenizer: Tokenizer, vocabulary: LLTokenizer) -> Callable[[str, str], bool]:
    """Whether a grammar lets a text through, as a whole output."""

    def does_take(grammar: str, text: str) -> bool:
        matcher = LLMatcher(vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return does_take


def random_output(grammar: str, tokenizer: Tokenizer, vocabulary: LLTokenizer, seed: int) -> str:
    """A text that the grammar lets through: tokens drawn from those it allows, and the end as soon as it may come."""
    matcher, rng, ids = LLMatcher(vocabulary, grammar), np.random.default_rng(seed), []
    assert not matcher.is_error(), matcher.get_error()
    eos = vocabulary.eos_token
    while not matcher.is_stopped():
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        if eos in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            break
        # Tags are drawn as often as all else together, so that the walk comes to an end.
        tags = [token for token in allowed if vocabulary.is_special_token(int(token)) and token != eos]
        others = [token for token in allowed if token not in tags and token != eos]
        token = int(rng.choice(tags if tags and (not others or rng.random() < 0.5) else others))
        assert matcher.consume_token(token)
        ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=False)


def calls_of(text: str, *, starts: str = "", tools: list[dict[str, Any]] = TOOLS) -> list[tuple[str, dict[str, Any]]]:
    """The calls of an output as a client gets them."""
    parts = MessageParser(starts, separates_reasoning=True, tools=tools).push(text, finished=True)
    names = [part.name for part in parts if isinstance(part, ToolCallPart) and part.name]
    arguments = [""] * len(names)
    for part in parts:
        if isinstance(part, ToolCallPart):
            arguments[part.index] += part.arguments
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(
    ("prompt", "good", "bad"),
    [
        (
            "<|assistant|>",
            ["\n<think>a\nb</think>\n{}", "<think></think>{}", "\n{}"],
            ["a{}", "<think>a{}", "{}</think>"],
        ),
        ("<|assistant|>\n<think>", ["a</think>\n{}", "</think>{}"], ["{}", "<think>a</think>{}"]),
        ("<|assistant|>\n<think></think>", ["{}", "\n{}"], ["<think>a</think>{}", "</think>{}"]),
    ],
    ids=["the model may think", "the prompt has begun to", "thinking is off"],
)
def test_reasoning_stands_where_the_prompt_leaves_it(
    prompt: str, good: list[str], bad: list[str], tokenizer: Tokenizer, takes: Callable[[str, str], bool]
) -> None:
    form = json_form({"type": "object"}, "schema", check)
    grammar = whole_output("@answer", "", {"answer": form}, Tags(tokenizer), Reasoning.after(prompt), check)
    assert [text for text in good if not takes(grammar, text)] == []
    assert [text for text in bad if takes(grammar, text)] == []


def test_without_tags_in_the_vocabulary_there_is_no_reasoning_and_no_call(fallback_tokenizer: Tokenizer) -> None:
    tags = Tags(fallback_tokenizer)
    grammar = whole_output("@answer", "", {"answer": regex_form("a", "regex", check)}, tags, Reasoning.OPTIONAL, check)
    assert "think" not in grammar
    with pytest.raises(RequestError, match="has no token '<arg_key>'"):
        ToolGrammar(dict(enumerate(TOOLS)), tags, check, enforce_all=True)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_schema_lets_through_is_valid(seed: int, tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
    text = random_output(json_form(PERSON, "schema", check).as_grammar(), tokenizer, vocabulary, seed)
    assert jsonschema_rs.is_valid(PERSON, json.loads(text)), text


def test_a_schema_lets_valid_json_through_and_no_other(takes: Callable[[str, str], bool]) -> None:
    grammar = json_form(PERSON, "schema", check).as_grammar()
    assert takes(grammar, '{"name": "Ada", "age": 36}')
    assert takes(grammar, '{\n  "name": "日本",\n  "age": 0,\n  "tags": ["a", "b"]\n}')
    for bad in ('{"name": "Ada"}', '{"name": "Ada", "age": 131}', '{"name": "Ada", "age": 3, "x": 1}', "[]", ""):
        assert not takes(grammar, bad)


def test_space_in_json_is_bounded(takes: Callable[[str, str], bool]) -> None:
    """A model that does not know how to go on could else write nothing but space."""
    grammar = json_form({"type": "object"}, "schema", check).as_grammar()
    assert takes(grammar, "{\n" + 32 * " " + "}")
    assert not takes(grammar, "{\n" + 33 * " " + "}")
    assert not takes(grammar, "{\n\n}")


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-z]+", "a/b\\/c", "first\nsecond", "(?i)yes|no", "日本?"])
def test_an_expression_matches_whole(pattern: str, tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
    grammar = regex_form(pattern, "regex", check).as_grammar()
    for seed in range(3):
        assert re.fullmatch(pattern, random_output(grammar, tokenizer, vocabulary, seed))


@pytest.mark.parametrize("text", ['root ::= "a" item+\nitem ::= [0-9] | "x"', 'start: "a" ITEM+\nITEM: /[0-9]|x/'])
def test_a_grammar_comes_in_either_notation(text: str, takes: Callable[[str, str], bool]) -> None:
    grammar = ebnf_form(text, "ebnf", check).as_grammar()
    assert takes(grammar, "a1x2")
    assert not takes(grammar, "a")
    assert not takes(grammar, "1")


@pytest.mark.parametrize(
    "make",
    [
        lambda: json_form({"type": "strange"}, "field", check),
        lambda: json_form({"type": "array", "uniqueItems": True}, "field", check),
        lambda: json_form({"$ref": "#/$defs/none"}, "field", check),
        lambda: json_form(False, "field", check),
        lambda: json_form({"enum": ["x" * MAX_GRAMMAR_LEN]}, "field", check),
        lambda: regex_form("[a-", "field", check),
        lambda: ebnf_form('root ::= "a', "field", check),
        lambda: ebnf_form("start: unknown", "field", check),
        lambda: ebnf_form("", "field", check),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_field(make: Callable[[], object]) -> None:
    with pytest.raises(RequestError, match=r"^field: ") as error:
        make()
    assert error.value.param == "field"
    assert len(str(error.value)) < 1000


# Tool calls.


def call(name: str, between: str = "\n", **arguments: str) -> str:
    body = "".join(
        f"<arg_key>{key}</arg_key>{between}<arg_value>{value}</arg_value>{between}" for key, value in arguments.items()
    )
    return f"<tool_call>{name}{between}{body}</tool_call>"


def tool_output(body: str, tokenizer: Tokenizer, *, enforce_all: bool, tools: list[dict[str, Any]] = TOOLS) -> str:
    grammar = ToolGrammar(dict(enumerate(tools)), Tags(tokenizer), check, enforce_all=enforce_all)
    return whole_output(body, grammar.rules, grammar.parts, Tags(tokenizer), Reasoning.OPTIONAL, check)


@pytest.mark.parametrize("between", ["\n", ""], ids=["glm45", "glm47"])
def test_calls_are_held_to_their_schemas(between: str, tokenizer: Tokenizer, takes: Callable[[str, str], bool]) -> None:
    grammar = tool_output("calls", tokenizer, enforce_all=True)
    good = call("find", between, unit="km", days="3")
    assert takes(grammar, good)
    assert takes(grammar, f"<think>Let me see.</think>\n{good}\n{good}")
    assert takes(grammar, call("find", between, text='any <b> "text"\n{', unit="mile", days="9", box="[0.5, 1]"))
    assert takes(grammar, call("now", between))
    bad = [
        call("find", between, unit="km"),
        call("find", between, unit="inch", days="3"),
        call("find", between, unit="km", days="0"),
        call("find", between, unit="km", days='"3"'),
        call("find", between, unit="km", days="3", box="[1]"),
        call("find", between, unit="km", days="3", box="[1, 2]"),
        call("find", between, unit="km", days="3", more="1"),
        call("lose", between),
        "No call at all",
        f"{good} and text",
        good[: -len("</tool_call>")],
    ]
    assert [text for text in bad if takes(grammar, text)] == []


def test_one_call_is_one(tokenizer: Tokenizer, takes: Callable[[str, str], bool]) -> None:
    grammar = tool_output("one_call", tokenizer, enforce_all=True)
    assert takes(grammar, call("now"))
    assert not takes(grammar, call("now") + "\n" + call("now"))


def test_of_free_calls_only_strict_ones_are_held_to_their_schema(
    tokenizer: Tokenizer, takes: Callable[[str, str], bool]
) -> None:
    grammar = tool_output("text_and_calls", tokenizer, enforce_all=False)
    good = call("find", unit="km", days="3")
    for text in ("", "Nothing to do.", good, f"<think>Hm.</think>Well: {good} Done.{good}", call("now", x="1", y="[")):
        assert takes(grammar, text), text
    for text in (call("find", unit="km"), call("find", unit="km", days="3", x="1"), call("lose"), "<tool_call>find"):
        assert not takes(grammar, text), text


def test_a_value_cannot_spell_out_its_closing_tag(tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
    """The tag has a token of its own; written with others, the parser would still read it as the tag."""
    grammar = tool_output("calls", tokenizer, enforce_all=True)
    matcher = LLMatcher(vocabulary, grammar)
    before = tokenizer.encode(
        f"{call('find', text='')[: -len('</arg_value></tool_call>') - 1]}a", add_special_tokens=False
    )
    assert matcher.try_consume_tokens(before) == len(before)
    spelled = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "</arg_value>"]
    assert matcher.try_consume_tokens(spelled[:-1]) == len(spelled) - 1
    assert matcher.validate_tokens(spelled[-1:]) == 0


@pytest.mark.parametrize("seed", range(12))
def test_whatever_calls_are_let_through_are_read_back_valid(
    seed: int, tokenizer: Tokenizer, vocabulary: LLTokenizer
) -> None:
    body = ("calls", "one_call", "text_and_calls")[seed % 3]
    text = random_output(tool_output(body, tokenizer, enforce_all=True), tokenizer, vocabulary, seed)
    calls = calls_of(text)
    assert calls or body == "text_and_calls"
    assert len(calls) == text.count("</tool_call>")
    for name, arguments in calls:
        if name == "find":
            assert jsonschema_rs.is_valid(FIND["parameters"], arguments), (text, arguments)
        else:
            assert (name, arguments) == ("now", {})


def test_an_answer_may_be_json_or_calls(tokenizer: Tokenizer, takes: Callable[[str, str], bool]) -> None:
    tools = ToolGrammar(dict(enumerate(TOOLS)), Tags(tokenizer), check, enforce_all=False)
    parts = {**tools.parts, "answer": json_form(PERSON, "schema", check)}
    grammar = whole_output("(@answer | calls)", tools.rules, parts, Tags(tokenizer), Reasoning.OPTIONAL, check)
    for text in (
        '{"name": "Ada", "age": 36}',
        call("now"),
        "\n<think>Hm.</think>\n" + call("find", unit="km", days="1"),
    ):
        assert takes(grammar, text), text
    for text in ("Hello", '{"name": "Ada"}', call("find"), '{"name": "Ada", "age": 36}' + call("now")):
        assert not takes(grammar, text), text


def test_a_schema_that_cannot_be_enforced_is_refused_if_strict_and_left_aside_if_not(
    tokenizer: Tokenizer, takes: Callable[[str, str], bool]
) -> None:
    parameters = {"type": "object", "properties": {"ids": {"type": "array", "uniqueItems": True}}, "required": ["ids"]}

    def tool(**more: Any) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": "find", "parameters": parameters, **more}}]

    grammar = tool_output("calls", tokenizer, enforce_all=True, tools=tool())
    assert takes(grammar, call("find", ids="[1, 1]"))
    assert not takes(grammar, call("find"))
    with pytest.raises(RequestError) as error:
        tool_output("calls", tokenizer, enforce_all=True, tools=tool(strict=True))
    assert error.value.param == "tools[0].function.parameters.properties.ids"


def test_a_schema_that_is_too_long_is_not_looked_at_argument_by_argument(tokenizer: Tokenizer) -> None:
    properties = {f"p{i}": {"$ref": "#/$defs/number"} for i in range(5000)}
    parameters = {"type": "object", "properties": properties, "$defs": {"number": {"type": "number"}}}

    def tool(**more: Any) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": "find", "parameters": parameters, **more}}]

    with pytest.raises(RequestError, match=r"^tools: their schemas make a grammar of \d+ characters"):
        tool_output("calls", tokenizer, enforce_all=True, tools=tool())
    with pytest.raises(RequestError, match="refers into a schema of more than") as error:
        tool_output("calls", tokenizer, enforce_all=True, tools=tool(strict=True))
    assert error.value.param == "tools[0].function.parameters.properties.p0"


def test_the_parts_of_an_output_are_told_apart_as_the_grammar_has_them(
    tokenizer: Tokenizer, vocabulary: LLTokenizer
) -> None:
    form = json_form(PERSON, "schema", check)
    grammar = whole_output("@answer", "", {"answer": form}, Tags(tokenizer), Reasoning.BEGUN, check)
    for seed in range(4):
        text = random_output(grammar, tokenizer, vocabulary, seed)
        parts = MessageParser("<think>", separates_reasoning=True).push(text, finished=True)
        content = "".join(part.text for part in parts if isinstance(part, ContentText))
        assert jsonschema_rs.is_valid(PERSON, json.loads(content)), text
        assert all(isinstance(part, ReasoningText | ContentText) for part in parts)


# What a reviewer of grammars would try.


@pytest.mark.parametrize("text", ["<think>", "a</arg_value>b", "<tool_call>"])
def test_text_that_spells_a_tag_is_spelled_out(text: str, tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
    """The tags' own tokens are not text, so that a mask which allowed only these would leave no way on."""
    for form in (regex_form(re.escape(text), "regex", check), json_form({"const": text}, "schema", check)):
        said = random_output(form.as_grammar(), tokenizer, vocabulary, 0)
        assert text in said
    options = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [text]}}}}}]
    said = random_output(tool_output("one_call", tokenizer, enforce_all=True, tools=options), tokenizer, vocabulary, 0)
    assert said.endswith("</tool_call>")


def test_references_in_arguments_point_into_the_tools_schema(
    tokenizer: Tokenizer, takes: Callable[[str, str], bool]
) -> None:
    parameters = {
        "type": "object",
        "properties": {
            "v": {"type": "integer"},
            "c": {"type": "array", "items": {"$ref": "#"}},
            "w": {"$ref": "#/properties/v"},
            "a/b~c": {"type": "array", "items": {"$ref": "#/$defs/d"}},
        },
        "required": ["v", "c"],
        "additionalProperties": False,
        "$defs": {"d": {"enum": [7]}},
    }
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
    grammar = tool_output("one_call", tokenizer, enforce_all=True, tools=tools)
    assert takes(grammar, call("f", v="1", c='[{"v": 2, "c": []}]', w="3"))
    assert takes(grammar, call("f", v="1", c="[]", **{"a/b~c": "[7]"}))
    assert not takes(grammar, call("f", v="1", c="[[[]]]"))
    assert not takes(grammar, call("f", v="1", c="[]", w="[]"))
    assert not takes(grammar, call("f", v="1", c="[]", **{"a/b~c": "[8]"}))


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/P", "$defs": {"P": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
        {"allOf": [{"properties": {"a": {"type": "integer"}}}]},
        {"properties": {"a": {}}, "oneOf": [{"required": ["a"]}]},
        {"properties": {}, "minProperties": 1},
        {"properties": {"a": {"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "integer"}]}}},
        {"properties": {"a": {"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "null"}], "maxLength": 0}}},
        {"properties": {"a": {"enum": ["1", 1]}}},
        {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}, {"type": "null"}]}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"type": "string", "pattern": "^[0-9]{3}$"}}},
        {"properties": {"a": False}},
        {"properties": {"a": {"enum": []}}},
        {"properties": {"a": {"type": "float"}}},
        {"properties": {"a": {"$ref": "http://x/y"}}},
        {"properties": {"a": {}}, "required": {"a": True}},
        {"properties": {" a": {}}},
        {"properties": {"a</arg_key>": {}}},
        {"properties": {"a": {"enum": ["x</arg_value>"]}}},
    ],
)
def test_a_strict_tool_is_held_to_all_of_its_schema_or_refused(parameters: Any, tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
    with pytest.raises(RequestError) as error:
        tool_output("one_call", tokenizer, enforce_all=True, tools=tools)
    assert (error.value.param or "").startswith("tools[0].function.parameters")
    tools[0]["function"]["strict"] = False  # type: ignore[index]
    check(tool_output("one_call", tokenizer, enforce_all=True, tools=tools))


def test_optional_text_is_free(tokenizer: Tokenizer, takes: Callable[[str, str], bool]) -> None:
    properties = {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "b": {"type": ["string", "integer"]}, "c": {}}
    function = {"name": "f", "strict": True, "parameters": {"properties": properties}}
    grammar = tool_output("one_call", tokenizer, enforce_all=True, tools=[{"type": "function", "function": function}])
    assert takes(grammar, call("f", a="null", b="any text", c="[1"))


OPTIONAL_CHOICES: list[dict[str, Any]] = [
    {"anyOf": [{"type": "string", "enum": ["km", "mile"]}, {"type": "null"}], "default": None, "title": "Unit"},
    {"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]},
    {"oneOf": [{"$ref": "#/$defs/unit", "description": "d"}, {"const": None}]},
    {"type": ["string", "null"], "enum": ["km", "mile", None]},
    {"type": "string", "nullable": True, "enum": ["km", "mile"]},
]
"""What ``Literal["km", "mile"] | None`` and an enumeration's class become, by several libraries."""


@pytest.mark.parametrize("schema", OPTIONAL_CHOICES, ids=json.dumps)
def test_a_choice_that_may_be_null_is_enforced(
    schema: dict[str, Any], tokenizer: Tokenizer, takes: Callable[[str, str], bool]
) -> None:
    defs = {"unit": {"type": "string", "enum": ["km", "mile"], "title": "Unit"}}
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": defs}
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
    grammar = tool_output("one_call", tokenizer, enforce_all=True, tools=tools)
    for text, value in (("km", "km"), ("mile", "mile"), ("null", None)):
        assert takes(grammar, call("f", a=text))
        assert calls_of(call("f", a=text), tools=tools) == [("f", {"a": value})]
    assert not any(takes(grammar, call("f", a=text)) for text in ("metre", "None", '"km"', ""))


@pytest.mark.parametrize("schema", [{"$ref": "#/$defs/t"}, {"allOf": [{"$ref": "#/$defs/t"}], "description": "d"}])
def test_text_that_a_reference_leads_to_is_free(
    schema: dict[str, Any], tokenizer: Tokenizer, takes: Callable[[str, str], bool]
) -> None:
    for one in (schema, {"anyOf": [schema, {"type": "null"}]}):
        parameters = {"properties": {"a": one}, "$defs": {"t": {"type": "string", "title": "T"}}}
        tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
        assert takes(tool_output("one_call", tokenizer, enforce_all=True, tools=tools), call("f", a="any text"))


def test_the_librarys_own_options_are_not_for_clients() -> None:
    with pytest.raises(RequestError, match="x-guidance"):
        json_form({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}, "field", check)
