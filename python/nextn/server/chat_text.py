"""From a choice's text to what a chat answer is made of: reasoning, content and tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nextn.server.answers import ChatDelta, ChatMessage, FunctionAnswer, ToolCallAnswer
from nextn.server.generating import Choice, Piece
from nextn.server.logprobs import chat_logprobs
from nextn.server.requests import ChatRequest
from nextn.server.services import Services


@dataclass(frozen=True, kw_only=True)
class ChatFeatures:
    """What of the text is set apart.

    tools: those the model is told of; None when there are none or ``tool_choice`` is "none"
    """

    tools: list[dict[str, Any]] | None


def chat_features(services: Services, asked: ChatRequest) -> ChatFeatures:
    """Check the tools and choose the parsers."""
    tools = asked.tools if asked.tools and asked.tool_choice != "none" else None
    return ChatFeatures(tools=tools)


class ChatWriter:
    """Turns the pieces of one choice into deltas."""

    def __init__(self, services: Services, asked: ChatRequest, features: ChatFeatures) -> None:
        self._tokenizer = services.require_tokenizer()
        self._num_top = (asked.top_logprobs or 0) if asked.logprobs else None
        self._parallel = asked.parallel_tool_calls is not False
        self._num_calls = 0

    def write(self, piece: Piece) -> tuple[list[ChatDelta], dict[str, Any] | None]:
        """The deltas of a piece, and the logprobs of its tokens."""
        deltas = [ChatDelta(content=piece.text)] if piece.text else []
        logprobs = None
        if self._num_top is not None and piece.logprobs:
            logprobs = chat_logprobs(piece.logprobs, self._tokenizer.token_text, self._num_top)
            deltas = deltas or [ChatDelta(content="")]
        return deltas, logprobs

    def finish_reason(self, choice: Choice) -> str | None:
        """OpenAI's word for how the choice ended."""
        return "tool_calls" if self._num_calls and choice.finish_reason == "stop" else choice.finish_reason


class Collector:
    """Joins the deltas of one choice into a message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCallAnswer] = {}
        self.logprobs: dict[str, Any] | None = None

    def add(self, deltas: list[ChatDelta], logprobs: dict[str, Any] | None) -> None:
        for delta in deltas:
            self._content.append(delta.content or "")
            self._reasoning.append(delta.reasoning_content or "")
            for call in delta.tool_calls or ():
                self._add_call(call.index, call.id, call.function.name, call.function.arguments)
        if logprobs is not None:
            self.logprobs = self.logprobs or {"content": [], "refusal": None}
            self.logprobs["content"].extend(logprobs["content"])

    def message(self) -> ChatMessage:
        content = "".join(self._content)
        return ChatMessage(
            content=None if self._calls and not content else content,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=list(self._calls.values()) or None,
        )

    def _add_call(self, index: int, call_id: str | None, name: str | None, arguments: str | None) -> None:
        known = self._calls.get(index)
        if known is None:
            known = ToolCallAnswer(id=call_id or "", function=FunctionAnswer(name=name or "", arguments=""))
        joined = known.function.arguments + (arguments or "")
        function = FunctionAnswer(name=known.function.name, arguments=joined)
        self._calls[index] = ToolCallAnswer(id=known.id, function=function)
