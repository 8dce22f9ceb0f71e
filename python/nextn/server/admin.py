"""Endpoints that tell how the server is, and those that an operator uses: health, info, metrics, cache, aborts."""

from __future__ import annotations

import asyncio
import dataclasses
from importlib import metadata
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from nextn.protocol.messages import AddRequest, EngineReady
from nextn.protocol.sampling import TokenSampling
from nextn.server.decoding import decode, read_body
from nextn.server.engine_client import EngineClient, EngineState
from nextn.server.errors import ApiError, from_output, invalid, model_not_found, unavailable
from nextn.server.metrics import CONTENT_TYPE
from nextn.server.openapi import documented
from nextn.server.page import render_page
from nextn.server.requests import AbortRequest
from nextn.server.services import Services

HEALTH_GENERATE_TIMEOUT = 20.0
_ABORT_DECODER = msgspec.json.Decoder(AbortRequest)


def version() -> str:
    return metadata.version("nextn")


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def router(services: Services) -> APIRouter:
    """Health, information and operation endpoints."""
    routes = APIRouter()
    engine = services.engine

    @routes.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        base_url = f"{request.url.scheme}://{request.url.netloc}"
        needs_key = services.args.api_key is not None
        chat = services.tokenizer is not None
        return HTMLResponse(
            render_page(base_url, services.served_model_name, engine.state.value, chat, needs_key),
            headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"},
        )

    @routes.get("/health", **documented(None, 503))
    async def health() -> Response:
        """200 from when the model is loaded until the server or its engine ends, as far as the server knows without
        asking the engine; ``draft`` says what is known to be wrong with speculation."""
        engine.require_ready()
        complaint = engine.draft_health.complaint if engine.draft_health is not None else None
        return json_response({"status": "ok"} if complaint is None else {"status": "ok", "draft": complaint})

    @routes.get("/health_generate", **documented(None, 500, 503))
    async def health_generate() -> Response:
        """200 once the engine has made a step: for one token of this request's own, or for any other request."""
        await _wait_for_life(services)
        return json_response({"status": "ok"})

    @routes.get("/v1/models", **documented(None))
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_card(services)]})

    @routes.get("/v1/models/{model_id:path}", **documented(None, 404))
    async def model(model_id: str) -> Response:
        if model_id != services.served_model_name:
            raise model_not_found(model_id, services.served_model_name)
        return json_response(_model_card(services))

    @routes.get("/model_info", operation_id="model_info", **documented(None, 503))
    @routes.get("/get_model_info", **documented(None, 503))
    async def get_model_info() -> Response:
        return json_response(_model_info(services, engine.require_ready()))

    @routes.get("/server_info", operation_id="server_info", **documented(None, 503))
    @routes.get("/get_server_info", **documented(None, 503))
    async def get_server_info() -> Response:
        info = await engine.get_info()
        return json_response(_server_info(services, info))

    @routes.get("/get_load", **documented(None, 503))
    async def get_load() -> Response:
        engine.require_ready()
        stats = engine.stats
        num_tokens = (stats.num_pages - stats.num_free_pages - stats.num_cached_pages) * stats.page_size
        load = {
            "dp_rank": 0,
            "num_reqs": stats.num_running + stats.num_queued,
            "num_waiting_reqs": stats.num_queued,
            "num_tokens": num_tokens,
        }
        return json_response([load])

    @routes.get("/metrics", **documented(None, 404, content="text/plain"))
    async def metrics() -> Response:
        if not services.args.enable_metrics:
            raise ApiError(404, "Metrics are off; start the server with --enable-metrics.", code="metrics_disabled")
        return Response(services.metrics.render(engine.stats, engine.draft_health), media_type=CONTENT_TYPE)

    @routes.get("/flush_cache", operation_id="flush_cache_get", **documented(None, 503))
    @routes.post("/flush_cache", operation_id="flush_cache_post", **documented(None, 503))
    async def flush_cache() -> Response:
        return json_response(await engine.flush_cache())

    @routes.post("/abort_request", **documented(AbortRequest))
    async def abort_request(request: Request) -> Response:
        """Always succeeds: a request that is unknown may have finished meanwhile."""
        asked = decode(await read_body(request, services.args.max_body_bytes), _ABORT_DECODER)
        if asked.rid is None and not asked.abort_all:
            raise invalid("Give 'rid', or 'abort_all': true.", "rid", "missing_required_parameter")
        engine.require_ready()
        engine.abort(None if asked.abort_all else asked.rid)
        return json_response({"success": True})

    return routes


async def _wait_for_life(services: Services) -> None:
    """Have the engine generate one token, or see it make a step for others meanwhile; or raise why neither happens."""
    ready = services.engine.require_ready()
    token_id = ready.eos_token_ids[0] if ready.eos_token_ids else 0
    sampling = TokenSampling(max_new_tokens=1, seed=0, temperature=0.0, ignore_eos=True)
    probe = AddRequest(rid=services.new_id("health"), input_ids=[token_id], sampling=sampling)
    generating = asyncio.create_task(_generate(services.engine, probe))
    stepping = asyncio.create_task(services.engine.wait_for_step())
    try:
        async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT):
            await asyncio.wait((generating, stepping), return_when=asyncio.FIRST_COMPLETED)
            if generating.done() and not _found_no_room(generating.exception()):
                generating.result()
            else:
                await stepping
    except TimeoutError:
        raise unavailable(f"The engine made no step within {HEALTH_GENERATE_TIMEOUT:g} s.") from None
    finally:
        generating.cancel()
        stepping.cancel()
        await asyncio.gather(generating, stepping, return_exceptions=True)


async def _generate(engine: EngineClient, probe: AddRequest) -> None:
    generation = engine.submit([probe], is_probe=True)
    try:
        while not generation.is_over:
            for _, output in await generation.receive():
                if output.finish_reason == "error":
                    raise from_output(output)
    finally:
        generation.close()


def _found_no_room(error: BaseException | None) -> bool:
    return isinstance(error, ApiError) and error.status == 429


def _model_card(services: Services) -> dict[str, Any]:
    """``root`` is where load generators look for the tokenizer."""
    card: dict[str, Any] = {
        "id": services.served_model_name,
        "object": "model",
        "created": services.created,
        "owned_by": "nextn",
        "root": _paths(services)["model_path"],
    }
    if services.engine.ready is not None:
        card["max_model_len"] = services.engine.ready.context_length
    return card


def _model_info(services: Services, ready: EngineReady) -> dict[str, Any]:
    return {
        **_paths(services),
        "served_model_name": services.served_model_name,
        "is_generation": True,
        "context_length": ready.context_length,
        "max_total_tokens": ready.max_total_tokens,
        "vocab_size": ready.vocab_size,
        "eos_token_ids": ready.eos_token_ids,
        "default_sampling_params": dataclasses.asdict(services.defaults),
        "model": ready.model,
    }


def _paths(services: Services) -> dict[str, Any]:
    """Where the model and its tokenizer are, as they were asked for."""
    return {
        "model_path": services.args.model_path or services.model_path,
        "tokenizer_path": services.args.tokenizer_path or services.model_path,
    }


def _server_info(services: Services, info: dict[str, Any]) -> dict[str, Any]:
    """The arguments (keys hidden), the engine's own account, and its statistics.

    internal_states: where sglang's load generators look for the accept length, at the end of a run
    """
    stats = services.engine.stats
    return {
        **services.args.redacted(),
        **_paths(services),
        "version": version(),
        "status": EngineState.READY.value,
        "served_model_name": services.served_model_name,
        "engine": info,
        "stats": {**msgspec.structs.asdict(stats), "accept_length": stats.accept_length},
        "internal_states": [{"avg_spec_accept_length": stats.accept_length or None}],
    }
