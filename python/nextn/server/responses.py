"""``/v1/responses``: OpenAI's newer API, over the same chat. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nextn.errors import RequestError
from nextn.server.answers import usage_of
from nextn.server.chat_request import check_supported as check_chat
from nextn.server.chat_request import plan_chat
from nextn.server.chat_text import ChatWriter
from nextn.server.decoding import decode, read_body
from nextn.server.errors import ApiError
from nextn.server.generating import Choice, Piece, Plan, generate
from nextn.server.openapi import documented
from nextn.server.prompts import maybe_in_thread
from nextn.server.replies import EventStream, JsonReply, as_api_error, sse
from nextn.server.responses_items import Event, OutputItems
from nextn.server.responses_request import ResponsesRequest, as_chat, check_supported, in_own_words
from nextn.server.sampling import context_limit
from nextn.server.services import Services
from nextn.server.tool_choice import offered_tools

_DECODER = msgspec.json.Decoder(ResponsesRequest)

_STATUS = {"length": "incomplete", "abort": "cancelled"}
"""By finish reason, where it is not ``completed``."""


def router(services: Services) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses", **documented(ResponsesRequest, 404, 429))
    async def post_response(request: Request) -> Response:
        body = await read_body(request, services.args.max_body_bytes)
        asked = decode(body, _DECODER)
        services.check_model(asked.model)
        check_supported(asked)
        most = context_limit(services.engine.require_ready())
        try:
            chat = await maybe_in_thread(len(body), lambda: as_chat(asked, most))
            chat = chat if chat.rid is not None else msgspec.structs.replace(chat, rid=services.new_id("resp"))
            check_chat(chat)
            offered = offered_tools(chat)
            plan = await plan_chat(services, chat, offered, len(body), request.is_disconnected)
        except (ApiError, RequestError) as error:
            raise in_own_words(as_api_error(error)) from None
        writer = ChatWriter(services, chat, list(offered.values()) or None, plan.prompts[0].text or "")
        answer = _Answer(services, asked, plan, writer)
        if asked.stream:
            return EventStream(_stream(services, plan, answer), services.metrics.count_abort, last=b"")
        return JsonReply(_collect(services, plan, answer), services.metrics.count_abort)

    return routes


async def _stream(services: Services, plan: Plan, answer: _Answer) -> AsyncGenerator[bytes, None]:
    num_events = 0

    def encoded(events: list[Event]) -> bytes:
        nonlocal num_events
        chunks = []
        for event in events:
            body = msgspec.json.encode({**event, "sequence_number": num_events})
            chunks.append(sse(body, event["type"]))
            num_events += 1
        return b"".join(chunks)

    try:
        async with aclosing(generate(services, plan)) as steps:
            async for pieces in steps:
                events = [] if num_events else answer.opening()
                for piece in pieces:
                    events += answer.add(piece)
                if events:
                    yield encoded(events)
        yield encoded([await answer.ending()])
    except (ApiError, RequestError) as error:
        if not num_events:
            raise
        yield encoded(answer.failing(as_api_error(error)))


async def _collect(services: Services, plan: Plan, answer: _Answer) -> bytes:
    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            for piece in pieces:
                answer.add(piece)
    return msgspec.json.encode((await answer.ending())["response"])


class _Answer:
    """One answer as it grows."""

    def __init__(self, services: Services, asked: ResponsesRequest, plan: Plan, writer: ChatWriter) -> None:
        self._services = services
        self._writer = writer
        self._items = OutputItems(seals_reasoning=asked.seals_reasoning)
        self._fields = _fields(services, asked, plan)
        self._choice: Choice | None = None

    def opening(self) -> list[Event]:
        """The events that begin a stream."""
        response = {**self._fields, "status": "in_progress", "output": []}
        return [{"type": f"response.{name}", "response": response} for name in ("created", "in_progress")]

    def add(self, piece: Piece) -> list[Event]:
        self._choice = piece.choice
        deltas, _ = self._writer.write(piece)
        events = [event for delta in deltas for event in self._items.add(delta)]
        if piece.choice.finish_reason is not None:
            reason = self._writer.finish_reason(piece.choice)
            events += self._items.end(is_cut=reason in _STATUS or self._writer.is_cut)
        return events

    async def ending(self) -> Event:
        """The event that ends a stream. Its ``response`` is the whole answer."""
        assert self._choice is not None, "an answer has an end"
        reason = self._writer.finish_reason(self._choice)
        status = _STATUS.get(reason or "", "completed")
        response = {
            **self._fields,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.items,
            "usage": await self._usage(self._choice),
        }
        return {"type": f"response.{'completed' if status == 'completed' else 'incomplete'}", "response": response}

    def failing(self, error: ApiError) -> list[Event]:
        """The events that end a stream that could not go on."""
        events = self._items.end(is_cut=True)
        failure = {"code": "server_error", "message": error.detail.message}
        response = {**self._fields, "status": "failed", "error": failure, "output": self._items.items}
        return [*events, {"type": "response.failed", "response": response}]

    async def _usage(self, choice: Choice) -> dict[str, Any]:
        usage, reasoning = usage_of([choice], 1), self._items.reasoning
        tokenizer = self._services.require_tokenizer()
        num_reasoning = await maybe_in_thread(len(reasoning), lambda: len(tokenizer.encode(reasoning)))
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,  # of those that cost more
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": min(num_reasoning, usage.completion_tokens)},
            "total_tokens": usage.total_tokens,
        }


def _fields(services: Services, asked: ResponsesRequest, plan: Plan) -> dict[str, Any]:
    """What an answer says of its request, and what of itself does not change."""
    form = asked.text.format if asked.text is not None else None
    choice = asked.tool_choice
    sampling = plan.samplings[0]
    return {
        "id": plan.rid,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": services.served_model_name,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning is not None else None, "summary": None},
        "store": False,
        "background": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "text": {"format": {"type": "text"} if form is None else _said(form)},
        "tool_choice": choice if isinstance(choice, str) else "auto" if choice is None else _said(choice),
        "tools": asked.tools or [],
        "truncation": "disabled",
        "service_tier": "default",
        "user": asked.user,
        "usage": None,
    }


def _said(part: msgspec.Struct) -> dict[str, Any]:
    """What the client has sent of it."""
    return {name: value for name, value in msgspec.to_builtins(part).items() if value is not None}
