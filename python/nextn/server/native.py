"""``/generate``, ``/tokenize`` and ``/detokenize``: the native API, with token ids in and out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nextn.protocol.messages import SpecStep, TokenLogprobs
from nextn.server.chat_request import check_tools, render_chat
from nextn.server.decoding import decode, read_body
from nextn.server.errors import invalid
from nextn.server.generating import Choice, Piece, Plan, generate
from nextn.server.grammar import own_grammar
from nextn.server.logprobs import TokenText, native_logprobs, native_top_logprobs
from nextn.server.neutral import check_neutral
from nextn.server.openapi import documented
from nextn.server.planning import Options, Wish, make_plan
from nextn.server.prompts import MAX_BATCH, is_batch, maybe_in_thread, read_prompts
from nextn.server.proving import IsGone
from nextn.server.replies import EventStream, JsonReply, sse
from nextn.server.requests import ChatRequest, DetokenizeRequest, GenerateRequest, NativeSampling, TokenizeRequest
from nextn.server.sampling import check_count, check_token_ids
from nextn.server.services import Services

DEFAULT_MAX_NEW_TOKENS = 128

_GENERATE = msgspec.json.Decoder(GenerateRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


def router(services: Services) -> APIRouter:
    """The native endpoints."""
    routes = APIRouter()
    max_bytes = services.args.max_body_bytes

    @routes.post("/generate", **documented(GenerateRequest, 429))
    async def post_generate(request: Request) -> Response:
        asked = decode(await read_body(request, max_bytes), _GENERATE)
        services.engine.require_ready()
        plan, is_single = await _plan(services, asked, request.is_disconnected)
        if asked.stream:
            return EventStream(_stream(services, asked, plan, is_single), services.metrics.count_abort)
        return JsonReply(_collect(services, asked, plan, is_single), services.metrics.count_abort)

    @routes.post("/tokenize", **documented(TokenizeRequest, 404))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, max_bytes)
        asked = decode(body, _TOKENIZE)
        services.check_model(asked.model)
        max_len = services.engine.require_ready().context_length
        _check_source(asked)
        if asked.messages is not None:
            chat = ChatRequest(messages=asked.messages, chat_template_kwargs=asked.chat_template_kwargs)
            check_tools(asked.tools)
            prompt = await render_chat(services, chat, asked.tools or None, len(body))
            return Response(_tokenized([prompt.token_ids], True, max_len), media_type="application/json")
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt or []
        check_count(texts, MAX_BATCH, "prompt")
        add_special = asked.add_special_tokens is not False
        tokenizer = services.require_tokenizer()

        def tokenized() -> bytes:
            return _tokenized(tokenizer.encode_batch(texts, add_special), isinstance(asked.prompt, str), max_len)

        answer = await maybe_in_thread(sum(map(len, texts)), tokenized)
        return Response(answer, media_type="application/json")

    @routes.post("/detokenize", **documented(DetokenizeRequest, 404))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, max_bytes)
        asked = decode(body, _DETOKENIZE)
        services.check_model(asked.model)
        tokenizer, vocab_size = services.require_tokenizer(), services.engine.require_ready().vocab_size
        skip = asked.skip_special_tokens is not False

        def detokenized() -> bytes:
            batch, is_single = _token_batches(asked.tokens)
            for ids in batch:
                check_token_ids(ids, vocab_size, "tokens")
            texts = tokenizer.decode_batch(batch, skip)
            return msgspec.json.encode({"text": texts[0] if is_single else texts})

        answer = await maybe_in_thread(len(body), detokenized)
        return Response(answer, media_type="application/json")

    return routes


def _check_source(asked: TokenizeRequest) -> None:
    """Refuse two sources of tokens, none, and what does not go with the one that there is."""
    if (asked.prompt is None) == (asked.messages is None):
        raise invalid("Give exactly one of 'prompt' and 'messages'.", "prompt", "invalid_value")
    source = "prompt" if asked.messages is None else "messages"
    for name in ("tools", "chat_template_kwargs") if source == "prompt" else ("add_special_tokens",):
        if getattr(asked, name):
            raise invalid(f"'{name}' does not go with '{source}'; leave it out.", name, "invalid_value")


def _tokenized(found: list[list[int]], is_single: bool, max_len: int) -> bytes:
    answer = {
        "tokens": found[0] if is_single else found,
        "count": len(found[0]) if is_single else [len(ids) for ids in found],
        "max_model_len": max_len,
    }
    return msgspec.json.encode(answer)


def _token_batches(tokens: Sequence[int | list[int]]) -> tuple[list[list[int]], bool]:
    """A list of ids, or of lists of ids, as a batch; True if it was one list."""
    flat = [item for item in tokens if isinstance(item, int)]
    lists = [item for item in tokens if not isinstance(item, int)]
    if flat and lists:
        raise invalid("'tokens' mixes ids and lists of ids.", "tokens", "invalid_value")
    check_count(lists, MAX_BATCH, "tokens")
    return (lists, False) if lists else ([flat], True)


async def _plan(services: Services, asked: GenerateRequest, is_gone: IsGone) -> tuple[Plan, bool]:
    """Check the request against every limit; also says whether one object answers it."""
    check_neutral(asked)
    if (asked.text is None) == (asked.input_ids is None):
        raise invalid("Give exactly one of 'text' and 'input_ids'.", "text", "invalid_value")
    given, param = (asked.text, "text") if asked.text is not None else (asked.input_ids, "input_ids")
    assert given is not None
    prompts = await read_prompts(services, given, param)
    params = _params_of(asked, len(prompts))
    wants_logprobs = bool(asked.return_logprob)
    start = -1 if asked.logprob_start_len is None else asked.logprob_start_len
    rids = _rids(services, asked.rid, len(prompts))
    options = Options(
        rid=rids[0] if len(rids) == 1 else services.new_id("batch"),
        rids=rids,
        n=params[0].n or 1,
        streams=bool(asked.stream),
        is_batch=is_batch(given),
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        num_top_logprobs=(asked.top_logprobs_num or 0) if wants_logprobs else None,
        prompt_logprobs_start=start if wants_logprobs and start >= 0 else None,
    )
    has_own = isinstance(asked.sampling_params, list)
    prefixes = [f"sampling_params[{i}]." if has_own else "sampling_params." for i in range(len(params))]
    different = list(zip(params, prefixes, strict=True))[: None if has_own else 1]
    grammars = [await own_grammar(services, one, is_gone, prefix) for one, prefix in different]
    wishes = [_wish(one, grammars[i % len(grammars)], prefixes[i], param) for i, one in enumerate(params)]
    return make_plan(services, prompts, wishes, options), not options.is_batch and options.n == 1


def _params_of(asked: GenerateRequest, num_prompts: int) -> list[NativeSampling]:
    """One set of sampling parameters per prompt."""
    given = asked.sampling_params or NativeSampling()
    params = given if isinstance(given, list) else [given] * num_prompts
    if len(params) != num_prompts:
        message = f"'sampling_params' has {len(params)} entries for {num_prompts} prompts."
        raise invalid(message, "sampling_params", "invalid_value")
    if len({one.n or 1 for one in params}) > 1:
        raise invalid("'n' must be the same for all prompts of a batch.", "sampling_params", "invalid_value")
    return params


def _wish(params: NativeSampling, grammar: str | None, prefix: str, prompt_param: str) -> Wish:
    return Wish(
        fields=params,
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        seed=params.seed if params.sampling_seed is None else params.sampling_seed,
        default_max_tokens=DEFAULT_MAX_NEW_TOKENS,
        grammar=grammar,
        prefix=prefix,
        prompt_param=prompt_param,
        min_param="min_new_tokens",
    )


def _rids(services: Services, given: str | list[str] | None, num_prompts: int) -> list[str]:
    """One name per prompt, the client's own where it gave some."""
    if given is None:
        return [services.new_id("gen") for _ in range(num_prompts)]
    rids = [given] if isinstance(given, str) else given
    if len(rids) != num_prompts:
        raise invalid(f"'rid' has {len(rids)} entries for {num_prompts} prompts.", "rid", "invalid_value")
    if len(set(rids)) != len(rids):
        raise invalid("'rid' has the same name twice.", "rid", "invalid_value")
    return rids


class _Answer:
    """The growing answer of one choice: text, ids and logprobs are cumulative, as clients of this API expect."""

    def __init__(self, asked: GenerateRequest, text_of: TokenText | None, started_at: float) -> None:
        self._asked = asked
        self._text_of = text_of if asked.return_text_in_logprobs else None
        self._started_at = started_at
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._spec_steps: list[SpecStep] = []

    def add(self, piece: Piece) -> None:
        self._text += piece.text
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        self._prompt_logprobs += piece.prompt_logprobs
        self._spec_steps += piece.spec_steps

    def so_far(self, choice: Choice) -> dict[str, Any]:
        """The whole answer, of the pieces that were added; ``choice`` has its totals."""
        return {"text": self._text, "output_ids": self._token_ids, "meta_info": self._meta_info(choice)}

    def _meta_info(self, choice: Choice) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": choice.rid,
            "finish_reason": _finish_reason(choice),
            "prompt_tokens": len(choice.prompt.token_ids),
            "completion_tokens": choice.num_tokens,
            "cached_tokens": choice.cached_tokens,
            "e2e_latency": time.monotonic() - self._started_at,
            "spec_verify_ct": choice.spec_verify_ct,
            "spec_steps": self._spec_steps,
        }
        if choice.spec_verify_ct:
            meta["spec_accept_length"] = choice.num_tokens / choice.spec_verify_ct
        if self._asked.return_logprob:
            meta["input_token_logprobs"] = native_logprobs(self._prompt_logprobs, self._text_of)
            meta["output_token_logprobs"] = native_logprobs(self._logprobs, self._text_of)
            if self._asked.top_logprobs_num:
                meta["input_top_logprobs"] = native_top_logprobs(self._prompt_logprobs, self._text_of)
                meta["output_top_logprobs"] = native_top_logprobs(self._logprobs, self._text_of)
        return meta


def _finish_reason(choice: Choice) -> dict[str, Any] | None:
    match choice.finish_reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": choice.num_tokens}
        case "abort":
            return {"type": "abort", "message": "the request was aborted"}
        case reason:
            return {"type": reason, "matched": choice.matched}


def _answers(services: Services, asked: GenerateRequest, plan: Plan) -> list[_Answer]:
    text_of = services.tokenizer.token_text if services.tokenizer is not None else None
    now = time.monotonic()
    return [_Answer(asked, text_of, now) for _ in range(len(plan.prompts) * plan.n)]


async def _stream(
    services: Services, asked: GenerateRequest, plan: Plan, is_single: bool
) -> AsyncGenerator[bytes, None]:
    answers = _answers(services, asked, plan)
    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            events = []
            for piece in pieces:
                index = piece.choice.index
                answers[index].add(piece)
                answer = answers[index].so_far(piece.choice)
                events.append(sse(msgspec.json.encode(answer if is_single else {**answer, "index": index})))
            if events:
                yield b"".join(events)


async def _collect(services: Services, asked: GenerateRequest, plan: Plan, is_single: bool) -> bytes:
    answers = _answers(services, asked, plan)
    choices: dict[int, Choice] = {}
    async with aclosing(generate(services, plan)) as steps:
        async for pieces in steps:
            for piece in pieces:
                answers[piece.choice.index].add(piece)
                choices[piece.choice.index] = piece.choice
    ordered = [answer.so_far(choices[index]) for index, answer in enumerate(answers)]
    return msgspec.json.encode(ordered[0] if is_single else ordered)
