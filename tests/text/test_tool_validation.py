from __future__ import annotations

import copy
from typing import Any

import pytest
from nextn.errors import RequestError
from nextn.text.tool_validation import MAX_TOOLS, validate_tools


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find", **function}}


@pytest.mark.parametrize(
    "good",
    [
        tool(),
        tool(parameters=None, description=None, strict=None),
        tool(parameters={}, strict=False, description="finds"),
        tool(parameters={}, strict=True),
        tool(parameters={"type": "object", "properties": {"a": {"type": "string"}, "b": True}, "required": ["a"]}),
        tool(name="server.find-it/v2:x"),
    ],
)
def test_a_well_formed_tool_is_taken_and_left_as_it_is(good: dict[str, Any]) -> None:
    before = copy.deepcopy(good)
    validate_tools([good])
    assert good == before
    with pytest.raises(RequestError, match="names two tools"):  # it was read: its name is known
        validate_tools([good, good])


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ("find", "tools[1]"),
        ({"function": {"name": "f"}}, "tools[1].type"),
        ({"type": "retrieval"}, "tools[1].type"),
        ({"type": "function"}, "tools[1].function"),
        ({"type": "function", "function": {}}, "tools[1].function.name"),
        (tool(name=""), "tools[1].function.name"),
        (tool(name="two words"), "tools[1].function.name"),
        (tool(name="a<b"), "tools[1].function.name"),
        (tool(name=7), "tools[1].function.name"),
        (tool(name="first"), "tools[1].function.name"),
        (tool(description=7), "tools[1].function.description"),
        (tool(strict="yes"), "tools[1].function.strict"),
        (tool(parameters=[]), "tools[1].function.parameters"),
        (tool(parameters={"type": "string"}), "tools[1].function.parameters.type"),
        (tool(parameters={"properties": []}), "tools[1].function.parameters.properties"),
        (tool(parameters={"properties": {"a": "string"}}), "tools[1].function.parameters.properties.a"),
    ],
)
def test_a_malformed_tool_is_refused_by_the_name_of_its_field(bad: Any, param: str) -> None:
    with pytest.raises(RequestError) as error:
        validate_tools([tool(name="first"), bad])
    assert error.value.param == param
    assert str(error.value).startswith(param)
    assert len(str(error.value)) < 300


def test_too_many_tools_are_refused() -> None:
    with pytest.raises(RequestError, match=f"at most {MAX_TOOLS}"):
        validate_tools([tool(name=f"f{i}") for i in range(MAX_TOOLS + 1)])
