"""From a chat request to a plan: what is not served is refused by name, and the messages become a prompt."""

from __future__ import annotations

from typing import Any

import msgspec

from nextn.server.decoding import check_depth
from nextn.server.errors import invalid, unsupported
from nextn.server.generating import Plan, Prompt
from nextn.server.grammar import chat_grammar
from nextn.server.openai_request import agreed, check_common
from nextn.server.planning import Options, Wish, make_plan
from nextn.server.prompts import maybe_in_thread
from nextn.server.proving import IsGone
from nextn.server.requests import ChatRequest, ContentPart, Message, is_given
from nextn.server.sampling import context_limit
from nextn.server.services import Services
from nextn.server.thinking import thinking_variables
from nextn.server.tool_choice import Tools
from nextn.text.tool_validation import validate_tools

INSTEAD = {
    "audio": "answers are text",
    "function_call": "use 'tool_choice'",
    "functions": "use 'tools'",
    "prediction": "leave it out; the model drafts its own answers",
    "verbosity": "say it in a message",
    "web_search_options": "offer a search of your own in 'tools'",
}
"""Fields of OpenAI's that are not served, and what to do."""


def check_supported(asked: ChatRequest) -> None:
    """Refuse what is known and not served, and combinations that mean nothing."""
    check_common(asked)
    for name, instead in INSTEAD.items():
        if is_given(getattr(asked, name)):
            raise unsupported(f"'{name}' is not supported: {instead}.", name)
    if asked.modalities not in (None, ["text"]):
        raise unsupported("'modalities' is supported as [\"text\"] only.", "modalities")
    if asked.tool_stream is False and asked.stream:
        message = "'tool_stream': false is not supported: arguments of tool calls are streamed as they come."
        raise unsupported(message, "tool_stream")
    form = asked.response_format
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        message = "'response_format.json_schema' belongs to the type 'json_schema', and to no other."
        raise invalid(message, "response_format.json_schema", "invalid_value")
    if asked.top_logprobs and not asked.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs", "invalid_value")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(asked, name) == 0:
            raise invalid(f"'{name}' must be at least 1.", name, "invalid_value")
    check_tools(asked.tools)


def check_tools(tools: list[dict[str, Any]] | None) -> None:
    """Refuse tools that the model cannot be told of."""
    check_depth(tools, "tools")
    validate_tools(tools or ())


async def plan_chat(services: Services, asked: ChatRequest, offered: Tools, size: int, is_gone: IsGone) -> Plan:
    """Render the messages and check every limit.

    offered: the tools that the model is told of
    size: bytes of the request, which tell how long rendering may take
    """
    prompt = await render_chat(services, asked, list(offered.values()) or None, size)
    grammar = await chat_grammar(services, asked, offered, prompt.text or "", is_gone)
    _, rid = agreed({"rid": asked.rid, "request_id": asked.request_id}) or ("", services.new_id("chatcmpl"))
    most = agreed({"max_tokens": asked.max_tokens, "max_completion_tokens": asked.max_completion_tokens})
    wish = Wish(
        fields=msgspec.structs.replace(asked, temperature=0.0) if asked.do_sample is False else asked,
        max_tokens=None if most is None else most[1],
        min_tokens=asked.min_tokens,
        seed=asked.seed,
        default_max_tokens=None,
        grammar=grammar,
        prompt_param="messages",
    )
    options = Options(
        rid=rid,
        rids=[rid],
        n=asked.n or 1,
        streams=bool(asked.stream),
        watches_text=asked.parallel_tool_calls is False,
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        num_top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    return make_plan(services, [prompt], [wish], options)


async def render_chat(services: Services, asked: ChatRequest, tools: list[dict[str, Any]] | None, size: int) -> Prompt:
    """The prompt of a chat.

    tools: those that the model is told of
    size: bytes of the request, which tell how long rendering may take
    """
    if not asked.messages:
        raise invalid("'messages' is empty; give at least one.", "messages", "invalid_value")
    _check_numbers(asked.messages, context_limit(services.engine.require_ready()))
    tokenizer = services.require_tokenizer()
    variables = thinking_variables(asked, tokenizer)

    def render() -> Prompt:
        messages = [_message(message, f"messages[{index}]") for index, message in enumerate(asked.messages)]
        text = tokenizer.apply_chat_template(messages, tools, **variables)
        return Prompt(token_ids=tokenizer.encode(text, add_special_tokens=False), text=text)

    return await maybe_in_thread(size, render)


def _check_numbers(messages: list[Message], most: int) -> None:
    """Refuse at once what cannot fit into a context of ``most`` tokens: each message, part and call takes one."""
    num_found = len(messages)
    check_number(num_found, most, "messages")
    for index, message in enumerate(messages):
        for name, items in (("content", message.content), ("tool_calls", message.tool_calls)):
            if isinstance(items, list):
                num_found += len(items)
                check_number(num_found, most, f"messages[{index}].{name}")


def check_number(num_found: int, most: int, where: str) -> None:
    """Refuse a conversation that has more parts than the context has tokens."""
    if num_found > most:
        message = f"Up to '{where}' there are {num_found} messages, parts and calls; the context has {most} tokens."
        raise invalid(message, where, "context_length_exceeded")


def _message(message: Message, where: str) -> dict[str, Any]:
    """A message as templates read it: only the fields that carry something, tool arguments as an object.

    GLM's templates print a content of null as ``None``, and the parts of a tool's as they stand in the request: both
    become text.
    """
    says_more = message.tool_calls or message.reasoning_content or message.reasoning
    if message.content is None and not (message.role == "assistant" and says_more):
        raise invalid(f"'{where}.content' is missing.", f"{where}.content", "invalid_value")
    content: Any = message.content or ""
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
        if message.role == "tool":
            content = "".join(part["text"] for part in content)
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    reasoning = agreed(
        {f"{where}.reasoning_content": message.reasoning_content, f"{where}.reasoning": message.reasoning}
    )
    if reasoning is not None:
        plain["reasoning_content"] = reasoning[1]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": tool_arguments(
                        call.function.arguments or "{}", f"{where}.tool_calls[{index}].function.arguments"
                    ),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return plain


def _part(part: ContentPart, where: str) -> dict[str, str]:
    if part.type != "text":
        raise unsupported(f"'{where}.type' {part.type!r:.100} is not supported; use 'text'.", f"{where}.type")
    if part.text is None:
        raise invalid(f"'{where}.text' is missing.", f"{where}.text", "invalid_value")
    return {"type": "text", "text": part.text}


def tool_arguments(given: str | dict[str, Any], where: str) -> dict[str, Any]:
    """Templates walk the arguments of a tool call, so they must be an object; clients send them as a JSON string."""
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise invalid(f"'{where}' is not valid JSON.", where, "invalid_value") from None
    if not isinstance(given, dict):
        raise invalid(f"'{where}' must be a JSON object.", where, "invalid_value")
    check_depth(given, where)
    return given
