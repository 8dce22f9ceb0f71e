"""The OpenAPI schema: request bodies from the msgspec types, and the one shape that errors have."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nextn.server import requests
from nextn.server.errors import ErrorBody
from nextn.server.responses_request import ResponsesRequest

REQUEST_TYPES = (
    requests.ChatRequest,
    requests.CompletionRequest,
    requests.GenerateRequest,
    ResponsesRequest,
    requests.TokenizeRequest,
    requests.DetokenizeRequest,
    requests.AbortRequest,
)
_REFERENCE = "#/components/schemas/{name}"


def documented(body: type[msgspec.Struct] | None, *statuses: int, content: str = "application/json") -> dict[str, Any]:
    """Keyword arguments for a route: its body type, its success content, and the failures it can answer."""
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(name="ErrorBody")}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "Success", "content": {content: {}}}}
    if content == "application/json" and body in REQUEST_TYPES[:4]:
        responses[200]["content"]["text/event-stream"] = {}
    for status in (400, 401, 413, 500, 503, *statuses) if body else (401, *statuses):
        responses[status] = {"description": "Failure", "content": error}
    extra: dict[str, Any] = {}
    if body is not None:
        schema = {"$ref": _REFERENCE.format(name=body.__name__)}
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}


def install_schema(app: FastAPI) -> None:
    """Serve a schema that has the msgspec types among its components."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, components = msgspec.json.schema_components((*REQUEST_TYPES, ErrorBody), ref_template=_REFERENCE)
            made.setdefault("components", {}).setdefault("schemas", {}).update(components)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
