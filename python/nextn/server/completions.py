"""``/v1/completions``: OpenAI's text completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nextn.protocol.messages import TokenLogprobs
from nextn.server.answers import Completion, CompletionChoice, SpecSteps, usage_of
from nextn.server.decoding import decode, read_body
from nextn.server.errors import unsupported
from nextn.server.generating import Choice, Piece, Plan, generate
from nextn.server.grammar import own_grammar
from nextn.server.logprobs import completion_logprobs
from nextn.server.openai_request import check_common
from nextn.server.openapi import documented
from nextn.server.planning import Options, Wish, make_plan
from nextn.server.prompts import is_batch, read_prompts
from nextn.server.proving import IsGone
from nextn.server.replies import EventStream, JsonReply, sse
from nextn.server.requests import CompletionRequest, StreamOptions
from nextn.server.services import Services

DEFAULT_MAX_TOKENS = 16

_DECODER = msgspec.json.Decoder(CompletionRequest)


def router(services: Services) -> APIRouter:
    """The completions endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions", **documented(CompletionRequest, 404, 429))
    async def post_completions(request: Request) -> Response:
        asked = decode(await read_body(request, services.args.max_body_bytes), _DECODER)
        services.check_model(asked.model)
        _refuse_unsupported(asked)
        services.engine.require_ready()
        services.require_tokenizer()
        plan = await _plan(services, asked, request.is_disconnected)
        if asked.stream:
            return EventStream(_stream(services, asked, plan), services.metrics.count_abort)
        return JsonReply(_collect(services, asked, plan), services.metrics.count_abort)

    return routes


def _refuse_unsupported(asked: CompletionRequest) -> None:
    check_common(asked)
    if asked.suffix:
        raise unsupported("'suffix' is not supported: these models do not fill in the middle.", "suffix")
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise unsupported("'best_of' is supported only where it equals 'n'.", "best_of")


async def _plan(services: Services, asked: CompletionRequest, is_gone: IsGone) -> Plan:
    prompts = await read_prompts(services, asked.prompt, "prompt")
    rid = asked.rid or services.new_id("cmpl")
    wish = Wish(
        fields=asked,
        max_tokens=asked.max_tokens,
        min_tokens=asked.min_tokens,
        seed=asked.seed,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        grammar=await own_grammar(services, asked, is_gone),
    )
    options = Options(
        rid=rid,
        rids=[rid] if len(prompts) == 1 else [f"{rid}-p{i}" for i in range(len(prompts))],
        n=asked.n or 1,
        streams=bool(asked.stream),
        is_batch=is_batch(asked.prompt),
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        num_top_logprobs=asked.logprobs,
        prompt_logprobs_start=0 if asked.echo and asked.logprobs is not None else None,
    )
    return make_plan(services, prompts, [wish] * len(prompts), options)


class _Writer:
    """Turns pieces into choices of an answer; keeps where the texts of each choice's tokens end, for their offsets."""

    def __init__(self, services: Services, asked: CompletionRequest, plan: Plan) -> None:
        self._tokenizer = services.require_tokenizer()
        self._asked = asked
        self._offsets = [0] * (len(plan.prompts) * plan.n)

    def has_news(self, piece: Piece) -> bool:
        """Whether a piece says anything that the client has asked for."""
        return not piece.is_empty or bool(self._asked.return_spec_steps and piece.spec_steps)

    def write(self, piece: Piece) -> CompletionChoice:
        choice = piece.choice
        echoed = self._prompt_text(choice) if piece.is_first and self._asked.echo else ""
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = self._logprobs([*piece.prompt_logprobs, *piece.logprobs], self._offsets[choice.index])
            self._offsets[choice.index] += sum(map(len, logprobs["tokens"]))
        return CompletionChoice(
            index=choice.index,
            text=echoed + piece.text,
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            matched_stop=choice.matched,
            spec_steps=piece.spec_steps if self._asked.return_spec_steps else msgspec.UNSET,
        )

    def _logprobs(self, tokens: list[TokenLogprobs], start: int) -> dict[str, Any]:
        return completion_logprobs(tokens, self._tokenizer.token_text, self._asked.logprobs or 0, start)

    def _prompt_text(self, choice: Choice) -> str:
        text = choice.prompt.text
        return self._tokenizer.decode(choice.prompt.token_ids) if text is None else text


async def _stream(services: Services, asked: CompletionRequest, plan: Plan) -> AsyncGenerator[bytes, None]:
    writer = _Writer(services, asked, plan)
    options = asked.stream_options or StreamOptions()
    created = int(time.time())
    seen: dict[int, Choice] = {}

    def chunk(choices: list[CompletionChoice], has_usage: bool | None = options.continuous_usage_stats) -> bytes:
        usage = usage_of(seen.values(), plan.n) if has_usage else None if options.include_usage else msgspec.UNSET
        answer = Completion(
            id=plan.rid, created=created, model=services.served_model_name, choices=choices, usage=usage
        )
        return sse(msgspec.json.encode(answer))

    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            seen.update((piece.choice.index, piece.choice) for piece in pieces)
            events = [chunk([writer.write(piece)]) for piece in pieces if writer.has_news(piece)]
            if events:
                yield b"".join(events)
    if options.include_usage:
        yield chunk([], has_usage=True)


async def _collect(services: Services, asked: CompletionRequest, plan: Plan) -> bytes:
    writer = _Writer(services, asked, plan)
    parts: dict[int, list[CompletionChoice]] = {}
    seen: dict[int, Choice] = {}
    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            for piece in pieces:
                parts.setdefault(piece.choice.index, []).append(writer.write(piece))
                seen[piece.choice.index] = piece.choice
    answer = Completion(
        id=plan.rid,
        created=int(time.time()),
        model=services.served_model_name,
        choices=[_joined(parts[index]) for index in sorted(parts)],
        usage=usage_of(seen.values(), plan.n),
    )
    return msgspec.json.encode(answer)


def _joined(parts: list[CompletionChoice]) -> CompletionChoice:
    """One choice that says what its parts say in turn."""
    last = parts[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = {
            key: None
            if last.logprobs[key] is None
            else [x for part in parts if part.logprobs for x in part.logprobs[key]]
            for key in last.logprobs
        }
    steps: SpecSteps = msgspec.UNSET
    if last.spec_steps is not msgspec.UNSET:
        steps = [step for part in parts for step in part.spec_steps or ()]
    return msgspec.structs.replace(last, text="".join(part.text for part in parts), logprobs=logprobs, spec_steps=steps)
