"""``/v1/chat/completions``: OpenAI's chat, with reasoning and tool calls."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nextn.server.answers import ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChunkChoice, usage_of
from nextn.server.chat_request import check_supported, plan_chat
from nextn.server.chat_text import ChatWriter, Collector
from nextn.server.decoding import decode, read_body
from nextn.server.generating import Choice, Plan, generate
from nextn.server.openapi import documented
from nextn.server.replies import EventStream, JsonReply, sse
from nextn.server.requests import ChatRequest, StreamOptions
from nextn.server.services import Services
from nextn.server.tool_choice import offered_tools

_DECODER = msgspec.json.Decoder(ChatRequest)


def router(services: Services) -> APIRouter:
    """The chat endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", **documented(ChatRequest, 404, 429))
    async def post_chat(request: Request) -> Response:
        body = await read_body(request, services.args.max_body_bytes)
        asked = decode(body, _DECODER)
        services.check_model(asked.model)
        check_supported(asked)
        services.engine.require_ready()
        offered = offered_tools(asked)
        plan = await plan_chat(services, asked, offered, len(body), request.is_disconnected)
        tools = list(offered.values()) or None
        prompt = plan.prompts[0].text or ""
        writers = [ChatWriter(services, asked, tools, prompt) for _ in range(plan.n)]
        if asked.stream:
            return EventStream(_stream(services, asked, plan, writers), services.metrics.count_abort)
        return JsonReply(_collect(services, plan, writers), services.metrics.count_abort)

    return routes


async def _stream(
    services: Services, asked: ChatRequest, plan: Plan, writers: list[ChatWriter]
) -> AsyncGenerator[bytes, None]:
    options = asked.stream_options or StreamOptions()
    created = int(time.time())
    seen: dict[int, Choice] = {}

    def chunk(choices: list[ChunkChoice], has_usage: bool | None = options.continuous_usage_stats) -> bytes:
        usage = usage_of(seen.values(), plan.n) if has_usage else None if options.include_usage else msgspec.UNSET
        model = services.served_model_name
        return sse(
            msgspec.json.encode(ChatChunk(id=plan.rid, created=created, model=model, choices=choices, usage=usage))
        )

    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            events = []
            for piece in pieces:
                choice = piece.choice
                seen[choice.index] = choice
                if piece.is_first:
                    opening = ChatDelta(role="assistant", content="")
                    events.append(chunk([ChunkChoice(index=choice.index, delta=opening)]))
                deltas, logprobs = writers[choice.index].write(piece)
                spec_steps = writers[choice.index].spec_steps(piece)
                for delta in deltas:
                    part = ChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, spec_steps=spec_steps)
                    events.append(chunk([part]))
                    logprobs, spec_steps = None, msgspec.UNSET
                if choice.finish_reason is not None:
                    reason = writers[choice.index].finish_reason(choice)
                    events.append(chunk([ChunkChoice(index=choice.index, delta=ChatDelta(), finish_reason=reason)]))
            if events:
                yield b"".join(events)
    if options.include_usage:
        yield chunk([], has_usage=True)


async def _collect(services: Services, plan: Plan, writers: list[ChatWriter]) -> bytes:
    collectors = [Collector() for _ in writers]
    seen: dict[int, Choice] = {}
    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            for piece in pieces:
                index = piece.choice.index
                seen[index] = piece.choice
                collectors[index].add(*writers[index].write(piece))
                collectors[index].add_steps(writers[index].spec_steps(piece))
    choices = [
        ChatChoice(
            index=index,
            message=collectors[index].message(),
            logprobs=collectors[index].logprobs,
            finish_reason=writers[index].finish_reason(choice),
            matched_stop=choice.matched,
            spec_steps=collectors[index].spec_steps,
        )
        for index, choice in sorted(seen.items())
    ]
    return msgspec.json.encode(
        ChatCompletion(
            id=plan.rid,
            created=int(time.time()),
            model=services.served_model_name,
            choices=choices,
            usage=usage_of(seen.values(), plan.n),
        )
    )
