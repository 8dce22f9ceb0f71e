"""API keys: who may call what."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from nextn.server.errors import unauthorized

OPEN_PATHS = frozenset({"/", "/health", "/metrics"})
ADMIN_PATHS = frozenset({"/flush_cache", "/abort_request"})


class ApiKeyGuard:
    """ASGI middleware that asks for ``Authorization: Bearer <key>`` where a key is set.

    Admin paths take the admin key if there is one, else the API key. Open paths take none.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, admin_api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_api_key = admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            wanted = self._key_for(scope["path"])
            if wanted and not _carries(scope, wanted):
                message = "Missing or wrong API key; send it as 'Authorization: Bearer <key>'."
                await unauthorized(message).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _key_for(self, path: str) -> str | None:
        if path in OPEN_PATHS:
            return None
        return (self._admin_api_key or self._api_key) if path in ADMIN_PATHS else self._api_key


def _carries(scope: Scope, key: str) -> bool:
    """Compare in constant time, on bytes."""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, credentials = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(credentials.strip(), key.encode())
