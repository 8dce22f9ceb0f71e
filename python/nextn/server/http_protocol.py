"""uvicorn's HTTP/1.1 protocol, with a cap on header bytes and errors in the server's own form."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from nextn.server.errors import ApiError, invalid, unavailable

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

MAX_HEADER_BYTES = 64 * 1024

HEADERS_TIMEOUT = 60.0
"""Seconds that a client has for the headers of a request, from its first byte or from the connection's beginning."""

MAX_IGNORED_BYTES = 64 * 2**20
LINGER_TIMEOUT = 30.0
"""Bytes and seconds that a client may still send before its connection is closed: many read only after that."""


class CappedHttpProtocol(HttpToolsProtocol):
    """Closes a connection that sends more than ``MAX_HEADER_BYTES`` of request line and headers, or of trailers, or
    no complete headers within ``HEADERS_TIMEOUT``.

    What cannot be read is refused only after the responses that are under way. A response to HTTP/1.0 that has no
    length ends with the connection. A request to go on in another protocol (``Upgrade``) is served as if it had not
    asked, as RFC 9110, 7.8 allows.
    Every request of a connection learns of its loss; uvicorn tells only the last of those that were pipelined.
    """

    _num_header_bytes = 0
    _in_headers = True
    _headers_timer: asyncio.TimerHandle | None = None
    _num_ignored_bytes: int | None = None  # None while what comes is read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: deque[RequestResponseCycle] = deque()  # of which the first may be answered by now

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def _expect_headers(self) -> None:
        self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT, self.transport.close)

    def _stop_expecting_headers(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def data_received(self, data: bytes) -> None:
        if self._num_ignored_bytes is not None:
            self._num_ignored_bytes += len(data)
            if self._num_ignored_bytes > MAX_IGNORED_BYTES and not self._unanswered:
                self.transport.close()
            return
        if self._in_headers:
            self._num_header_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._in_headers and self._headers_timer is None and not self._unanswered:
            self._expect_headers()
        if self._in_headers and self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(
                ApiError(431, f"The headers have more than {MAX_HEADER_BYTES} bytes.", code="headers_too_large")
            )

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._refuse(invalid("The bytes on this connection are not a valid HTTP/1.1 request."))
                return

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The last headers again, without the one for which the parser left their body and all else (``rest``)."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(invalid("CONNECT is not served here."))
            return b""
        headers = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"%s %s HTTP/%s\r\n%s\r\n%s" % (method, self.url, version, headers, rest)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_headers = False
        self._stop_expecting_headers()
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        async def answer(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            await app(scope, receive, self._sender(cycle))

        super()._start_asgi_task(cycle, answer)

    def _sender(self, cycle: RequestResponseCycle) -> ASGISendCallable:
        """What sends the response of ``cycle``, where uvicorn would send chunks to HTTP/1.0, or close too early."""
        ends_by_closing = False

        async def send(message: ASGISendEvent) -> None:
            nonlocal ends_by_closing
            lingers = False
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                ends_by_closing = cycle.scope["http_version"] == "1.0" and not has_length
                if ends_by_closing:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body":
                if ends_by_closing:
                    cycle.expected_content_length = len(message.get("body", b""))
                if not cycle.keep_alive and not message.get("more_body", False):
                    lingers = cycle.more_body or self._num_ignored_bytes is not None
                    cycle.keep_alive = lingers  # else uvicorn closes
            await cycle.send(message)
            if lingers:
                self._linger()

        return send

    @property
    def _unanswered(self) -> deque[RequestResponseCycle]:
        """The requests whose responses are not complete, in the order of both."""
        while self._requests and self._requests[0].response_complete:
            self._requests.popleft()
        return self._requests

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_expecting_headers()
        self._disconnect()

    def _disconnect(self) -> None:
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    def shutdown(self) -> None:
        """Close as soon as what was asked is answered; a request whose body has not come yet is refused."""
        super().shutdown()
        if self._is_reading_request:
            self._refuse(unavailable("The server is shutting down and takes no new requests."))
        if not self._unanswered:
            self.transport.close()

    def cut(self) -> None:
        """Break off a response that is under way."""
        if any(cycle.response_started for cycle in self._unanswered):
            self._disconnect()
            self.transport.abort()

    def on_chunk_header(self) -> None:
        """A chunk begins: its bytes follow, or trailers after the last, empty one."""
        self._in_headers = True

    def on_body(self, body: bytes) -> None:
        self._in_headers = False
        self._num_header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_headers = True
        self._num_header_bytes = 0
        super().on_message_complete()

    @property
    def _is_reading_request(self) -> bool:
        """True where a request's body is still on the way, and nothing answers it yet."""
        unanswered = self._unanswered
        return bool(unanswered) and unanswered[-1].more_body and not unanswered[-1].response_started

    def _refuse(self, error: ApiError) -> None:
        """Read nothing more, and close: with ``error``, or after the responses that are under way."""
        self._num_ignored_bytes = 0
        if self._is_reading_request:
            refused = self._unanswered.pop()
            refused.disconnected = True
            refused.message_event.set()
        if self._unanswered:
            self._unanswered[-1].keep_alive = False
            return
        body = error.body
        head = b"%scontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (STATUS_LINE[error.status], len(body)) + body)
        self._linger()

    def _linger(self) -> None:
        """Close when the client has sent what it is sending: data that nobody takes would cost it the answer."""
        self._num_ignored_bytes = self._num_ignored_bytes or 0
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(LINGER_TIMEOUT, self.transport.close)
            self.flow.resume_reading()
            self.transport.write_eof()
