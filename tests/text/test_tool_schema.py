from __future__ import annotations

import ast
import contextlib
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.text.tool_schema import ToolSchemas


def typed(schema: Any, text: str, **root: Any) -> str:
    """JSON text of an argument ``x`` with this schema; ``root`` are further keywords of the parameters."""
    parameters = {"type": "object", "properties": {"x": schema}, **root}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    return ToolSchemas(tools).type_of("f", "x").to_json(text)


STRING, INTEGER, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}


@pytest.mark.parametrize(
    "schema",
    [
        STRING,
        {"type": ["string"]},
        {"enum": ["123", "456"]},
        {"const": "123"},
        {"anyOf": [STRING, {"enum": ["a"]}]},
        {"oneOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/Name"}]},
        {"allOf": [{"type": ["string", "integer"]}, STRING]},
        {"type": "string", "anyOf": [{"minLength": 1}, {"maxLength": 9}]},
        {"$ref": "#/$defs/Name"},
        {"$ref": "#/$defs/Indirect"},
        {"$ref": "#/$defs/A%20Name"},
        {"$ref": "#/%24defs/Name"},
        {"type": ["string", "integer"], "enum": ["a", "b"]},
    ],
)
@pytest.mark.parametrize("text", ["123", " 123\n", "true", '"quoted"', "null", "[1]", '\\n "<b>" é🦊', ""])
def test_a_string_stays_the_text_it_is(schema: Any, text: str) -> None:
    defs = {"Name": STRING, "A Name": STRING, "Indirect": {"allOf": [{"$ref": "#/$defs/Name"}]}}
    assert json.loads(typed(schema, text, **{"$defs": defs})) == text


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (INTEGER, "5", 5),
        (INTEGER, " 5\n", 5),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "-1.5e3", -1500.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "True", True),
        ({"type": "array", "items": STRING}, '["1", "b"]', ["1", "b"]),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"type": "object"}, "{'a': True}", {"a": True}),
        ({"items": STRING}, "[]", []),
        (NULL, "None", None),
        (INTEGER, "five", "five"),
        ({"type": "array"}, "[1, 2", "[1, 2"),
        ({"anyOf": [STRING, NULL]}, "null", None),
        ({"anyOf": [STRING, NULL]}, "123", "123"),
        ({"anyOf": [STRING, NULL]}, '"123"', '"123"'),
        ({"type": ["string", "null"]}, "true", "true"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "5", "5"),
        ({"type": "string", "nullable": True, "enum": ["a", "b"]}, "null", None),
        ({"$ref": "#/$defs/list/1", "nullable": True}, "null", None),
        ({"$ref": "#/$defs/list/1", "nullable": True}, "5", "5"),
        ({"anyOf": [STRING], "nullable": True}, "None", None),
        ({"nullable": True}, "5", 5),
        ({"oneOf": [STRING, INTEGER]}, "123", 123),
        ({"oneOf": [STRING, INTEGER]}, "12a", "12a"),
        ({"oneOf": [STRING, INTEGER]}, "1.5", "1.5"),
        ({"enum": [1, "auto"]}, "1", 1),
        ({"enum": [1, "auto"]}, "auto", "auto"),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/$defs/a~1b"}, "7", 7),
        ({"$ref": "#/$defs/list/1"}, "7", "7"),
        ({"$ref": "#/nowhere"}, "7", 7),
        ({"$ref": "https://example.com/schema"}, "7", 7),
        ({"$ref": "#anchor"}, "'7'", "7"),
        ({"$ref": "#"}, "{}", {}),
        ({"$ref": "#/$defs/Loop"}, "7", 7),
        ({}, "7", 7),
        (True, '"7"', "7"),
        ({}, "seven", "seven"),
        ({}, " seven ", " seven "),
        ({}, "'7'", "7"),
        ({}, "True", True),
        ({}, "1, 2", "1, 2"),
        ({}, "1_000", "1_000"),
        ({}, "NaN", "NaN"),
        ({}, "{1, 2}", "{1, 2}"),
        ({}, "[float]", "[float]"),
        ({"type": "what"}, "7", 7),
    ],
)
def test_text_becomes_what_the_schema_allows(schema: Any, text: str, expected: Any) -> None:
    defs = {
        "Point": {"type": "object"},
        "a/b": INTEGER,
        "list": [INTEGER, STRING],
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]},
    }
    value = json.loads(typed(schema, text, **{"$defs": defs}))
    assert value == expected
    assert type(value) is type(expected)


def test_a_number_keeps_its_digits() -> None:
    assert typed({"type": "number"}, "0.1000000000000000055511151231257827") == "0.1000000000000000055511151231257827"


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/Arguments", "$defs": {"Arguments": {"properties": {"x": STRING}}}},
        {"allOf": [{"properties": {"y": INTEGER}}, {"properties": {"x": STRING}}]},
        {"anyOf": [{"properties": {"x": STRING}}]},
        {"additionalProperties": STRING},
    ],
)
def test_a_property_is_found_wherever_the_schema_has_it(parameters: Any) -> None:
    schemas = ToolSchemas([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert schemas.type_of("f", "x").is_text


@pytest.mark.parametrize("parameters", [None, True, {}, {"properties": {}}, {"properties": []}, "what"])
def test_an_unknown_argument_may_be_anything(parameters: Any) -> None:
    schemas = ToolSchemas([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    for tool in ("f", "unknown"):
        assert schemas.type_of(tool, "x").to_json("7") == "7"
        assert schemas.type_of(tool, "x").to_json("seven") == '"seven"'


def test_arguments_with_references_share_one_copy_of_the_schema() -> None:
    """A copy for each would be gigabytes where there are thousands."""
    properties = {f"p{i}": {"$ref": "#/$defs/number"} for i in range(300)}
    parameters = {"type": "object", "properties": properties, "$defs": {"number": {"type": "number"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    schemas = [schema for _, schema, _ in ToolSchemas(tools).arguments_of("f")]
    assert len(schemas) == 300
    assert len({id(schema["$defs"]["root"]) for schema in schemas}) == 1


def test_references_that_multiply_cost_no_time() -> None:
    """Each definition names the next twice: 2^40 paths."""
    defs: dict[str, Any] = {f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}] * 2} for i in range(40)}
    assert typed({"$ref": "#/$defs/D0"}, "7", **{"$defs": defs}) == "7"


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "['" * 3000, "{'a': " * 500, "'\\d'", "[\x00]"])
def test_no_text_breaks_the_typing(text: str) -> None:
    assert isinstance(json.loads(typed({"type": "array"}, text)), str | list)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(value=json_values)
def test_a_json_value_comes_back_as_it_is(value: Any) -> None:
    assert json.loads(typed({}, json.dumps(value))) == value


@settings(deadline=None)
@given(text=st.text())
def test_a_string_is_its_text_and_anything_else_is_json_a_literal_or_the_text(text: str) -> None:
    assert json.loads(typed(STRING, text)) == text
    for schema in ({}, INTEGER, {"type": "object"}, {"type": ["string", "null"]}):
        value = json.loads(typed(schema, text))
        assert value == text or value in readings(text)


def readings(text: str) -> list[Any]:
    """What the text says as JSON and as a Python literal."""
    found: list[Any] = []
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError), warnings.catch_warnings(action="ignore"):
            found.append(read(text.strip()))
    return found
