"""Checking the tool definitions of a request, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nextn.errors import RequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[^\s<>]{1,256}")


def validate_tools(tools: Sequence[Any], param: str = "tools") -> None:
    """Check that every tool can be offered to the model and its calls can be read back.

    param: where the tools stand in the request
    Raises RequestError naming the field at fault.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{param}: found {len(tools)} tools, expected at most {MAX_TOOLS}", param)
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = _checked_name(tool, f"{param}[{index}]")
        if name in names:
            at = f"{param}[{index}].function.name"
            raise RequestError(f"{at}: {name!r} names two tools; give each its own name", at)
        names.add(name)


def _checked_name(tool: Any, at: str) -> str:
    if not isinstance(tool, Mapping):
        raise _wrong(at, tool, "an object with type and function")
    if tool.get("type") != "function":
        raise _wrong(f"{at}.type", tool.get("type"), "'function'")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _wrong(f"{at}.function", function, "an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(f"{at}.function.name", name, "1 to 256 characters, none of them space, < or >")
    if not isinstance(function.get("description", ""), str | None):
        raise _wrong(f"{at}.function.description", function["description"], "a string")
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{at}.function.strict", function["strict"], "true or false")
    _check_parameters(function.get("parameters"), f"{at}.function.parameters")
    return name


def _check_parameters(parameters: Any, at: str) -> None:
    """The parameters are a JSON schema of an object; what it says deeper down is the caller's."""
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise _wrong(at, parameters, "a JSON schema, an object")
    if parameters.get("type", "object") != "object":
        raise _wrong(f"{at}.type", parameters["type"], "'object'")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping):
        raise _wrong(f"{at}.properties", properties, "an object")
    for name, schema in properties.items():
        if not isinstance(schema, Mapping | bool):
            raise _wrong(f"{at}.properties.{name:.100}", schema, "a JSON schema")


def _wrong(at: str, found: Any, expected: str) -> RequestError:
    return RequestError(f"{at}: found {str(found) if found is not None else 'nothing':.100}, expected {expected}", at)
