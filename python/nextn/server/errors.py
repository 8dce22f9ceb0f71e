"""The error contract: every failure is ``{"error": {"message", "type", "param", "code"}}`` with a fitting status."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from nextn.errors import RequestError
from nextn.protocol.messages import RequestOutput

MAX_MESSAGE_LEN = 1000
MAX_PARAM_LEN = 250
"""Characters; beyond, it is what the client has sent that is long."""


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What a client needs to know; ``param`` is the path of the field at fault, as ``messages[0].content``."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success, and of the SSE event that ends a failed stream."""

    error: ErrorDetail


class ApiError(Exception):
    """A failure with its HTTP status. Raise it anywhere below an endpoint."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.detail = ErrorDetail(
            message=_short(message, MAX_MESSAGE_LEN),
            type=type,
            param=None if param is None else _short(param, MAX_PARAM_LEN),
            code=code,
        )

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, media_type="application/json")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def invalid(message: str, param: str | None = None, code: str = "invalid_request_error") -> ApiError:
    """400: the request is wrong, and sending it again will not help."""
    return ApiError(400, message, param=param, code=code)


def unsupported(message: str, param: str) -> ApiError:
    """400: a parameter that exists elsewhere and is not served here."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def too_large(message: str) -> ApiError:
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def model_not_found(name: str, served: str) -> ApiError:
    message = f"The model {name!r:.200} is not served here; this server has {served!r}."
    return ApiError(404, message, param="model", code="model_not_found")


def queue_full(message: str) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code="queue_full", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """503: loading, draining or gone; another server, or this one later, may answer."""
    return ApiError(503, message, type="server_error", code="unavailable", headers={"Retry-After": "5"})


def internal(message: str) -> ApiError:
    return ApiError(500, message or "internal error", type="server_error", code="internal_error")


def from_request_error(error: RequestError) -> ApiError:
    return invalid(str(error), error.param, error.code)


def from_output(output: RequestOutput) -> ApiError:
    """The failure that a terminal message with ``finish_reason="error"`` stands for."""
    message = output.error or "the engine gave no reason"
    match output.error_kind:
        case "queue_full":
            return queue_full(message)
        case "unavailable":
            return unavailable(message)
        case "invalid":
            return invalid(message)
        case _:
            return internal(message)
