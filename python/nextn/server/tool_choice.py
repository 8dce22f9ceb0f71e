"""Which of a request's tools the model is told of, and of which it must call one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nextn.server.errors import ApiError, invalid
from nextn.server.requests import AllowedTools, ChatRequest, NamedTool

Tools = dict[int, dict[str, Any]]
"""Tools in OpenAI's form, by their index in the request."""


def offered_tools(asked: ChatRequest) -> Tools:
    """The tools that the model is told of. Raises ApiError 400 where others are allowed than there are."""
    choice, tools = asked.tool_choice, dict(enumerate(asked.tools or ()))
    if choice == "none":
        return {}
    if not isinstance(choice, AllowedTools):
        return tools
    subset = choice.subset
    if subset is None:
        raise _missing("tool_choice.allowed_tools")
    indices = _indices(tools)
    allowed = {_index_of(named, indices) for named in subset.tools}
    return {i: tool for i, tool in tools.items() if i in allowed}


def forced_tools(asked: ChatRequest, offered: Tools) -> Tools:
    """The tools of which one must be called; none where the model chooses."""
    choice = asked.tool_choice
    mode = choice.subset.mode if isinstance(choice, AllowedTools) and choice.subset is not None else choice
    if mode in (None, "auto", "none"):
        return {}
    if not offered:
        raise invalid("'tool_choice' asks for a call, but there are no 'tools'.", "tool_choice", "invalid_value")
    if mode == "required":
        return offered
    assert isinstance(choice, NamedTool), "decoded as one"
    index = _index_of(choice, _indices(offered))
    return {index: offered[index]}


def _indices(tools: Tools) -> Mapping[str, int]:
    """Of the tools, by their names."""
    return {tool["function"]["name"]: index for index, tool in tools.items()}


def _index_of(named: NamedTool, indices: Mapping[str, int]) -> int:
    name = named.function.name if named.function is not None else named.name
    if name is None:
        raise _missing("tool_choice.function")
    if name in indices:
        return indices[name]
    raise invalid(f"'tool_choice' names {name!r:.100}, which is none of 'tools'.", "tool_choice", "invalid_value")


def _missing(field: str) -> ApiError:
    return invalid(f"Missing required parameter '{field}'.", field, "missing_required_parameter")
