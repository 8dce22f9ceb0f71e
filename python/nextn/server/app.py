"""The HTTP application: routers, middleware, and the error contract around all of them."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nextn.errors import RequestError
from nextn.server import admin, chat, completions, native, responses
from nextn.server.auth import ApiKeyGuard
from nextn.server.errors import ApiError, from_request_error, unavailable
from nextn.server.openapi import install_schema
from nextn.server.replies import as_api_error
from nextn.server.services import Services

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(services: Services) -> ASGIApp:
    """The whole application around ``services``, ready to be served."""
    app = FastAPI(
        title="nextn",
        version=admin.version(),
        description="OpenAI-compatible inference for GLM-4.x MoE models.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for module in (chat, completions, responses, native, admin):
        app.include_router(module.router(services))
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    install_schema(app)
    whole = _LastResort(ApiKeyGuard(app, services.args.api_key, services.args.admin_api_key))
    if services.args.allowed_origins is None:
        return whole
    return CORSMiddleware(  # outside the guard: a browser asks without a key whether it may call
        whole,
        allow_origins=[origin.strip() for origin in services.args.allowed_origins.split(",")],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return from_request_error(error).response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    hint = f"; use {allowed}" if allowed else ""
    message = f"{request.method} {request.url.path:.200} is not served here{hint}."
    code = _HTTP_CODES.get(error.status_code, "http_error")
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


class _LastResort:
    """Outermost middleware: an exception that nobody foresaw becomes a 500 in the contract's form, and a log line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:  # before its body was here: there is nobody to answer
            pass
        except asyncio.CancelledError:  # by the end of the server
            if not begun:
                await unavailable("The server was shut down.").response()(scope, receive, send)
        except Exception as error:
            failure = as_api_error(error)
            if not begun:
                await failure.response()(scope, receive, send)
