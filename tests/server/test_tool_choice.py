"""Which tools a request offers, and what it takes to find them."""

from __future__ import annotations

from typing import Any

from nextn.server.requests import AllowedTools, ChatRequest, NamedTool
from nextn.server.tool_choice import offered_tools


class Counted(dict[str, Any]):
    """Counts how often it is read."""

    num_reads = 0

    def __getitem__(self, key: str) -> Any:
        self.num_reads += 1
        return super().__getitem__(key)


def test_a_long_list_of_allowed_tools_is_not_held_against_each_tool() -> None:
    tools = [Counted(type="function", function={"name": f"t{i}"}) for i in range(128)]
    names = [NamedTool(name=f"t{i % 2 + 126}") for i in range(1000)]
    asked = ChatRequest(messages=[], tools=list(tools), tool_choice=AllowedTools(mode="auto", tools=names))
    assert list(offered_tools(asked)) == [126, 127]
    assert sum(tool.num_reads for tool in tools) < 5 * (len(tools) + len(names))
