"""What the OpenAI endpoints answer, as structs that encode fast: a streamed token costs one small encoding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from nextn.protocol.messages import SpecStep
from nextn.server.generating import Choice


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Draft tokens that became output, and those that did not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage_of(choices: Iterable[Choice], n: int) -> Usage:
    """Totals of one HTTP request, so far; a prompt counts once, however many choices it has."""
    every = sorted(choices, key=lambda choice: choice.index, reverse=True)
    first = {choice.index // n: choice for choice in every}.values()
    num_prompt = sum(len(choice.prompt.token_ids) for choice in first)
    num_output = sum(choice.num_tokens for choice in every)
    num_accepted = sum(choice.num_accepted for choice in every)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        prompt_tokens_details=PromptTokensDetails(sum(choice.cached_tokens for choice in first)),
        completion_tokens_details=CompletionTokensDetails(
            num_accepted, sum(choice.num_drafted for choice in every) - num_accepted
        ),
    )


SpecSteps = list[SpecStep] | msgspec.UnsetType
"""Steps of a choice, or of a chunk of it; UNSET where the client has not asked."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """matched_stop: the stop string, or the id of the stop token, that ended it"""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    spec_steps: SpecSteps = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A text completion, or a chunk of one. ``usage`` is UNSET where a chunk has none."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    spec_steps: SpecSteps = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class FunctionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    arguments: str


class ToolCallAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: FunctionAnswer
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """``content`` is null when there are only tool calls."""

    content: str | None
    role: str = "assistant"
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    spec_steps: SpecSteps = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
