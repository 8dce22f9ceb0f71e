"""From a choice's text to what a chat answer is made of: reasoning, content and tool calls."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from nextn.server.answers import (
    ChatDelta,
    ChatMessage,
    FunctionAnswer,
    FunctionDelta,
    SpecSteps,
    ToolCallAnswer,
    ToolCallDelta,
)
from nextn.server.generating import Choice, Piece
from nextn.server.logprobs import chat_logprobs
from nextn.server.requests import ChatRequest
from nextn.server.services import Services
from nextn.text.message import MessageParser, MessagePart, ReasoningText
from nextn.text.tool_calls import ContentText


class ChatWriter:
    """Turns the pieces of one choice into deltas.

    tools: those that the model was told of; None leaves what looks like a call in the content
    prompt: the rendered prompt, whose end tells whether the answer begins inside its reasoning
    is_cut: whether the output has ended inside a call
    """

    def __init__(self, services: Services, asked: ChatRequest, tools: list[dict[str, Any]] | None, prompt: str) -> None:
        self._tokenizer = services.require_tokenizer()
        separates = separates_reasoning(services, asked)
        self._parser = MessageParser(prompt, separates_reasoning=separates, tools=tools)
        self._wants_steps = bool(asked.return_spec_steps)
        self._num_top = (asked.top_logprobs or 0) if asked.logprobs else None
        self._ends_after_call = asked.parallel_tool_calls is False
        self.is_cut = False

    def write(self, piece: Piece) -> tuple[list[ChatDelta], dict[str, Any] | None]:
        """The deltas of a piece, and the logprobs of its tokens.

        Finishes the choice after its first tool call where the client wants no parallel calls.
        """
        deltas = []
        for part in self._parser.push(piece.text, piece.choice.finish_reason is not None):
            deltas.append(_delta(part))
            if isinstance(part, ReasoningText | ContentText) or not part.is_last:
                continue
            self.is_cut = part.is_cut
            if self._ends_after_call and not part.is_cut:
                piece.choice.finish("stop")
                break
        logprobs = None
        if self._num_top is not None and piece.logprobs:
            logprobs = chat_logprobs(piece.logprobs, self._tokenizer, self._num_top)
        if logprobs is not None or (self._wants_steps and piece.spec_steps):
            deltas = deltas or [ChatDelta(content="")]  # something for them to stand beside
        return deltas, logprobs

    def spec_steps(self, piece: Piece) -> SpecSteps:
        """The steps of a piece, if the client has asked."""
        return piece.spec_steps if self._wants_steps else msgspec.UNSET

    def finish_reason(self, choice: Choice) -> str | None:
        """OpenAI's word for how the choice ended: calls that may be made, or why there is no more."""
        has_calls = self._parser.num_calls > 0 and not self.is_cut
        return "tool_calls" if has_calls and choice.finish_reason == "stop" else choice.finish_reason


def separates_reasoning(services: Services, asked: ChatRequest) -> bool:
    """Whether the reasoning is set apart from the content."""
    wanted = asked.separate_reasoning
    return services.args.reasoning_parser is not None if wanted is None else wanted


def _delta(part: MessagePart) -> ChatDelta:
    """A part of a message in OpenAI's form; a call gets its id together with its name."""
    if isinstance(part, ReasoningText):
        return ChatDelta(reasoning_content=part.text)
    if isinstance(part, ContentText):
        return ChatDelta(content=part.text)
    if part.name is None:
        call = ToolCallDelta(index=part.index, function=FunctionDelta(arguments=part.arguments))
    else:
        function = FunctionDelta(name=part.name, arguments="")
        call_id = f"call_{random.getrandbits(96):024x}"
        call = ToolCallDelta(index=part.index, function=function, id=call_id, type="function")
    return ChatDelta(tool_calls=[call])


class Collector:
    """Joins the deltas of one choice into a message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCallAnswer] = {}
        self.logprobs: dict[str, Any] | None = None
        self.spec_steps: SpecSteps = msgspec.UNSET

    def add_steps(self, steps: SpecSteps) -> None:
        if steps is not msgspec.UNSET:
            self.spec_steps = steps if self.spec_steps is msgspec.UNSET else self.spec_steps + steps

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
