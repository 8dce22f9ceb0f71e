"""An assistant's message from its text as it arrives: reasoning, content and tool calls, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nextn.text.reasoning import THINK_CLOSE, ReasoningParser, starts_inside_reasoning
from nextn.text.tags import num_held_back
from nextn.text.tool_calls import ContentText, ToolCallParser, ToolCallPart


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """Text of the reasoning."""

    text: str


MessagePart = ReasoningText | ContentText | ToolCallPart


class MessageParser:
    """Splits one output. Joined, the parts do not depend on how the text is cut into pushes.

    prompt: the rendered prompt; its end tells whether the output starts inside the reasoning
    separates_reasoning: False leaves the reasoning, tags included, in the content
    tools: those that the model was told of; None leaves tool calls in the content
    """

    def __init__(
        self, prompt: str, *, separates_reasoning: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self._reasoning = ReasoningParser(starts_inside_reasoning(prompt)) if separates_reasoning else None
        self._calls = None if tools is None else ToolCallParser(tools)
        self._stray_close = _StrayClose()

    @property
    def num_calls(self) -> int:
        """Tool calls announced so far."""
        return 0 if self._calls is None else self._calls.num_calls

    def push(self, text: str, finished: bool) -> list[MessagePart]:
        """Add text; ``finished`` says that no more will come."""
        parts: list[MessagePart] = []
        content = text
        if self._reasoning is not None:
            delta = self._reasoning.push(text, finished)
            content = delta.content
            if delta.reasoning:
                parts.append(ReasoningText(delta.reasoning))
        for part in self._split_calls(content, finished):
            parts += self._without_stray_close(part)
        rest = self._stray_close.flush() if finished else ""
        return [*parts, ContentText(rest)] if rest else parts

    def _without_stray_close(self, part: ContentText | ToolCallPart) -> list[MessagePart]:
        if self._reasoning is None or not self._reasoning.ended_by_call:
            return [part] if part != ContentText("") else []
        is_content = isinstance(part, ContentText)
        text = self._stray_close.remove(part.text) if isinstance(part, ContentText) else self._stray_close.flush()
        before: list[MessagePart] = [ContentText(text)] if text else []
        return before if is_content else [*before, part]

    def _split_calls(self, content: str, finished: bool) -> Sequence[ContentText | ToolCallPart]:
        return [ContentText(content)] if self._calls is None else self._calls.push(content, finished)


class _StrayClose:
    """Takes the first ``</think>`` out of the content: the end of reasoning that a tool call has ended already.

    The newlines after it are dropped with it.
    """

    def __init__(self) -> None:
        self._is_found = False
        self._drops_newlines = False
        self._held_back = ""

    def remove(self, text: str) -> str:
        if not self._is_found:
            text, self._held_back = self._held_back + text, ""
            before, tag, after = text.partition(THINK_CLOSE)
            if not tag:
                end = len(text) - num_held_back(text, (THINK_CLOSE,))
                self._held_back = text[end:]
                return text[:end]
            self._is_found = self._drops_newlines = True
            return before + self.remove(after)
        if self._drops_newlines:
            text = text.lstrip("\n")
            self._drops_newlines = not text
        return text

    def flush(self) -> str:
        rest, self._held_back = self._held_back, ""
        return rest
