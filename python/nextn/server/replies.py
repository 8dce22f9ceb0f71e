"""Responses that take long: they end early when the client leaves, and turn failures into the error contract."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nextn.errors import RequestError
from nextn.server.errors import ApiError, from_request_error, internal

logger = logging.getLogger(__name__)

SSE_DONE = b"data: [DONE]\n\n"


def sse(payload: bytes, name: str | None = None) -> bytes:
    """One server-sent event. JSON has no raw newline, so one ``data:`` line holds it."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + payload + b"\n\n"


class JsonReply(Response):
    """A JSON answer whose body ``work`` makes, for instance by generating text."""

    def __init__(self, work: Coroutine[Any, Any, bytes], on_disconnect: Callable[[], None]) -> None:
        super().__init__(media_type="application/json")
        self._work = work
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer() -> None:
            try:
                response = Response(await self._work, media_type="application/json")
            except Exception as error:
                response = as_api_error(error).response()
            await response(scope, receive, send)

        try:
            if not await _run_while_connected(receive, answer()):
                self._on_disconnect()
        finally:
            self._work.close()


class EventStream(Response):
    """Server-sent events from ``events``, an asynchronous generator of encoded events.

    Headers leave with the first event, so a failure before it still has its own HTTP status; a failure after it
    becomes an error event, and the stream ends there.

    last: ends a stream that did not fail
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], on_disconnect: Callable[[], None], last: bytes = SSE_DONE
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._on_disconnect = on_disconnect
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not await _run_while_connected(receive, self._write(scope, receive, send)):
                self._on_disconnect()
        finally:
            await self._events.aclose()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for event in self._events:
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    begun = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
            last = self._last
        except Exception as error:
            failure = as_api_error(error)
            if not begun:
                await failure.response()(scope, receive, send)
                return
            last = sse(failure.body)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def as_api_error(error: Exception) -> ApiError:
    """The failure to report for an exception; what is the server's own fault is logged."""
    if isinstance(error, ApiError):
        if error.status == 500:
            logger.warning("request failed status=500 reason=%s", error)
        return error
    if isinstance(error, RequestError):
        return from_request_error(error)
    logger.error("request failed unexpectedly", exc_info=error)
    return internal("The server failed unexpectedly; its log says why.")


async def _run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run ``work`` to its end and return True, or cancel it and return False when the client leaves first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
