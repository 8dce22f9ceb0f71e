"""``POST /v1/responses``: from OpenAI's newer request to the chat request that means the same.

Nothing is stored: a conversation comes whole with each request. Its items (messages, reasoning, calls, their outputs)
become turns of a chat; what one assistant turn consists of may be several items in a row.
"""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from nextn.server.chat_request import check_number, tool_arguments
from nextn.server.decoding import convert
from nextn.server.errors import ApiError, invalid, unsupported
from nextn.server.neutral import check_neutral
from nextn.server.requests import (
    AllowedTools,
    ChatRequest,
    ChatTemplateOptions,
    FunctionCall,
    JsonSchema,
    Message,
    NamedTool,
    PositiveInt,
    ResponseFormat,
    Rid,
    SamplingFields,
    Strict,
    ToolCall,
    Unread,
    is_given,
)

T = TypeVar("T", bound=Strict)

ENCRYPTED_CONTENT = "reasoning.encrypted_content"
"""What ``include`` may ask for."""

_SEALED = "nextn:"
"""Begins the ``encrypted_content`` of this server's reasoning, which is the text, only encoded: the client has it."""

_TEXTS = frozenset({"input_text", "output_text", "reasoning_text", "summary_text", "text"})

INSTEAD = {
    "conversation": "this server keeps no conversations; send the whole of it as 'input'",
    "previous_response_id": "this server keeps no answers; send the whole conversation as 'input'",
    "prompt": "this server keeps no prompts; send it as 'instructions' and 'input'",
    "context_management": "the whole 'input' is read, as it is",
    "max_tool_calls": "every call is left to the client",
    "moderation": "say what is allowed in 'instructions'",
}
"""Fields of OpenAI's that are not served, and what to do."""


class StreamFormat(Strict, kw_only=True, frozen=True):
    include_obfuscation: bool | None = None


class ReasoningOptions(Strict, kw_only=True, frozen=True):
    """effort: as ``reasoning_effort`` of a chat; summary: none is ever made, and ``auto`` lets the server choose"""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Strict, kw_only=True, frozen=True):
    """What the answer's text is; name and what follows it belong to ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict, kw_only=True, frozen=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(SamplingFields, kw_only=True, frozen=True):
    """``POST /v1/responses``; fields that are not OpenAI's are those of a chat.

    input: a user's message, or items: messages, and what earlier answers have as ``output``
    client_metadata: a label of Codex's
    conversation and what follows it: known so that the refusal can say what to do instead
    """

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    stream: bool | None = None
    stream_options: StreamFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    background: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    client_metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    rid: Rid | None = None
    conversation: Unread = msgspec.field(default_factory=Unread)
    previous_response_id: Unread = msgspec.field(default_factory=Unread)
    prompt: Unread = msgspec.field(default_factory=Unread)
    context_management: Unread = msgspec.field(default_factory=Unread)
    max_tool_calls: Unread = msgspec.field(default_factory=Unread)
    moderation: Unread = msgspec.field(default_factory=Unread)

    @property
    def seals_reasoning(self) -> bool:
        """Whether reasoning is wanted in a form that clients hand back without looking into it."""
        return ENCRYPTED_CONTENT in (self.include or ())


class _Message(Strict, kw_only=True, frozen=True):
    """id, status, phase: what an earlier answer said of it, unused; as in the items below"""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: str = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class _Call(Strict, kw_only=True, frozen=True):
    """caller and what follows it: null, as the openai package writes what an answer did not have"""

    call_id: str
    name: Annotated[str, Meta(min_length=1)]
    arguments: str
    type: str
    id: str | None = None
    status: str | None = None
    caller: None = None
    namespace: None = None
    async_: None = None


class _CallOutput(Strict, kw_only=True, frozen=True):
    call_id: str
    output: str | list[dict[str, Any]]
    type: str
    id: str | None = None
    status: str | None = None


class _Reasoning(Strict, kw_only=True, frozen=True):
    type: str
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class _TextPart(Strict, kw_only=True, frozen=True):
    type: str
    text: str
    annotations: Any = None
    logprobs: Any = None


class _FunctionTool(Strict, kw_only=True, frozen=True):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def check_supported(asked: ResponsesRequest) -> None:
    """Refuse what is known and not served. Raises ApiError 400."""
    check_neutral(asked)
    for name, instead in INSTEAD.items():
        if is_given(getattr(asked, name)):
            raise unsupported(f"'{name}' is not supported: {instead}.", name)
    options, reasoning, text = asked.stream_options, asked.reasoning or ReasoningOptions(), asked.text or TextOptions()
    only_that_of_this_server = {
        "store": (asked.store, (None, False), "false: this server keeps no answers"),
        "service_tier": (asked.service_tier, (None, "auto", "default"), "'auto' or 'default'"),
        "truncation": (asked.truncation, (None, "disabled"), "'disabled': an input that is too long is refused"),
        "top_logprobs": (asked.top_logprobs, (None, 0), "0; ask for them at /v1/chat/completions"),
        "text.verbosity": (text.verbosity, (None, "medium"), "'medium'; say it in 'instructions'"),
        "reasoning.summary": (reasoning.summary, (None, "auto"), "'auto': there are none, reasoning comes whole"),
        "reasoning.generate_summary": (reasoning.generate_summary, (None, "auto"), "'auto': there are none"),
        "stream_options.include_obfuscation": (
            options and options.include_obfuscation,
            (None, False),
            "false: events are not padded",
        ),
    }
    for name, (value, served, which) in only_that_of_this_server.items():
        if value not in served:
            raise unsupported(f"'{name}' is supported as {which}.", name)
    for index, wanted in enumerate(asked.include or ()):
        if wanted != ENCRYPTED_CONTENT:
            message = f"'include[{index}]' {wanted!r:.100} is not supported; {ENCRYPTED_CONTENT!r} is."
            raise unsupported(message, f"include[{index}]")


def as_chat(asked: ResponsesRequest, most: int) -> ChatRequest:
    """The same request of a chat.

    most: tokens of the context: of items, and parts of them, no more can fit
    Raises ApiError 400, naming the field.
    """
    of_chats = {name: getattr(asked, name) for name in (*SamplingFields.__struct_fields__, *_SHARED)}
    return ChatRequest(
        **of_chats,
        messages=_messages(asked, most),
        max_completion_tokens=asked.max_output_tokens,
        tools=None if asked.tools is None else [_tool(tool, f"tools[{i}]") for i, tool in enumerate(asked.tools)],
        response_format=_form(asked),
        reasoning_effort=None if asked.reasoning is None else asked.reasoning.effort,
    )


_SHARED = (
    "model",
    "stream",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "priority",
    "cache_salt",
    "rid",
)

_OF_CHATS = (
    (re.compile(r"^messages"), "input"),
    (re.compile(r"^max_completion_tokens"), "max_output_tokens"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
)
"""Fields of a chat, and what they are called here."""


def in_own_words(error: ApiError) -> ApiError:
    """A failure that names a field of the chat, naming that of the request."""
    detail = error.detail
    if detail.param is None:
        return error
    own = detail.param
    for of_chats, here in _OF_CHATS:
        own = of_chats.sub(here, own)
    is_path = "." in detail.param or "[" in detail.param  # and not a word that a sentence may have
    message = detail.message.replace(*(detail.param, own) if is_path else (f"'{detail.param}'", f"'{own}'"))
    return ApiError(error.status, message, type=detail.type, param=own, code=detail.code, headers=error.headers)


def sealed(reasoning: str) -> str:
    """Reasoning as ``encrypted_content``."""
    return _SEALED + base64.b64encode(reasoning.encode()).decode()


def _unsealed(text: str, where: str) -> str:
    try:
        if text.startswith(_SEALED):
            return base64.b64decode(text.removeprefix(_SEALED), validate=True).decode()
    except ValueError:  # no base64, or no text in it
        pass
    raise invalid(f"'{where}' is not of this server; leave it out.", where, "invalid_value")


def _messages(asked: ResponsesRequest, most: int) -> list[Message]:
    messages = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        return [*messages, Message(role="user", content=asked.input)]
    if not asked.input:
        raise invalid("'input' is empty; give at least one item.", "input", "invalid_value")
    num_found = 0
    for index, item in enumerate(asked.input):
        lists = [value for value in item.values() if isinstance(value, list)]
        num_found += 1 + sum(map(len, lists))
        check_number(num_found, most, f"input[{index}]")
    for index, item in enumerate(asked.input):
        _add(messages, _read(item, f"input[{index}]"))
    return messages


def _read(item: dict[str, Any], where: str) -> Message:
    """One item as a message of its own."""
    match item.get("type", "message"):
        case "message":
            message = convert(item, _Message, where)
            return Message(role=message.role, content=_text(message.content, f"{where}.content"))
        case "reasoning":
            reasoning = convert(item, _Reasoning, where)
            text = _text(reasoning.content or [], f"{where}.content")
            if not text and reasoning.encrypted_content is not None:
                text = _unsealed(reasoning.encrypted_content, f"{where}.encrypted_content")
            return Message(role="assistant", reasoning_content=text)
        case "function_call":
            call = convert(item, _Call, where)
            arguments = tool_arguments(call.arguments or "{}", f"{where}.arguments")
            function = FunctionCall(name=call.name, arguments=arguments)
            return Message(role="assistant", tool_calls=[ToolCall(function=function, id=call.call_id)])
        case "function_call_output":
            output = convert(item, _CallOutput, where)
            return Message(role="tool", content=_text(output.output, f"{where}.output"), tool_call_id=output.call_id)
        case "item_reference":
            raise unsupported(f"'{where}' is not supported: this server keeps no items; send the item.", where)
        case other:
            raise unsupported(f"'{where}.type' {other!r:.100} is not supported.", f"{where}.type")


def _add(messages: list[Message], item: Message) -> None:
    """Append an item, or join it to the assistant's turn before: reasoning, then text, then calls, if any."""
    if item.role == "assistant" and not item.reasoning_content and item.content is None and item.tool_calls is None:
        return  # reasoning of which there is a summary at most
    last = messages[-1] if messages else item
    if last.role != "assistant" or item.role != "assistant" or not _may_follow(item, last):
        messages.append(item)
        return
    if last.tool_calls is not None:
        last.tool_calls.extend(item.tool_calls or ())
        return
    content = last.content if item.content is None else item.content
    messages[-1] = msgspec.structs.replace(last, content=content, tool_calls=item.tool_calls)


def _may_follow(item: Message, last: Message) -> bool:
    """Whether the item continues the turn: one call may follow another, all else only what stands before it."""
    return item is not last and (_rank(item) > _rank(last) or _rank(item) == _rank(last) == _CALLS)


_CALLS = 2


def _rank(turn: Message) -> int:
    """What an assistant's turn ends with: 0 is reasoning, 1 text."""
    return _CALLS if turn.tool_calls else 1 if turn.content is not None else 0


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    """The text of all parts: this server reads nothing else."""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        kind = part.get("type")
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif isinstance(kind, str) and kind in _TEXTS:
            texts.append(convert(part, _TextPart, at).text)
        else:
            raise unsupported(f"'{at}.type' {kind!r:.100} is not supported; use 'input_text'.", f"{at}.type")
    return "".join(texts)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool in the form that chats have."""
    if tool.get("type") != "function":
        kind = tool.get("type")
        raise unsupported(f"'{where}.type' {kind!r:.100} is not supported; use 'function'.", f"{where}.type")
    known = convert(tool, _FunctionTool, where)
    fields = ("name", "description", "parameters", "strict")
    function = {field: getattr(known, field) for field in fields if getattr(known, field) is not None}
    return {"type": "function", "function": function}


def _form(asked: ResponsesRequest) -> ResponseFormat | None:
    form = None if asked.text is None else asked.text.format
    if form is None:
        return None
    if form.type != "json_schema":
        for name in ("name", "schema", "description", "strict"):
            if getattr(form, name) is not None:
                where = f"text.format.{name}"
                message = f"'{where}' belongs to the type 'json_schema', and to no other."
                raise invalid(message, where, "invalid_value")
        return ResponseFormat(type=form.type)
    schema = JsonSchema(name=form.name or "", description=form.description, schema=form.schema, strict=form.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)
