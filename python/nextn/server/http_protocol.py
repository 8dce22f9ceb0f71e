"""uvicorn's HTTP/1.1 protocol, with a cap on header bytes and errors in the server's own form."""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from nextn.server.errors import ApiError, invalid, unavailable

MAX_HEADER_BYTES = 64 * 1024

HEADERS_TIMEOUT = 60.0
"""Seconds that a client has for the headers of a request, from its first byte or from the connection's beginning."""


class CappedHttpProtocol(HttpToolsProtocol):
    """Closes a connection that sends more than ``MAX_HEADER_BYTES`` of request line and headers, or of trailers, or
    no complete headers within ``HEADERS_TIMEOUT``.

    A request to go on in another protocol (``Upgrade``) is served as if it had not asked, as RFC 9110, 7.8 allows.
    Every request of a connection learns of its loss; uvicorn tells only the last of those that were pipelined.
    """

    _num_header_bytes = 0
    _in_headers = True
    _requests: tuple[RequestResponseCycle, ...] = ()
    _headers_timer: asyncio.TimerHandle | None = None

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
        if self._in_headers:
            self._num_header_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(invalid("The bytes on this connection are not a valid HTTP/1.1 request."))
        if self._in_headers and self._headers_timer is None and not self._unanswered:
            self._expect_headers()
        if self._in_headers and self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(
                ApiError(431, f"The headers have more than {MAX_HEADER_BYTES} bytes.", code="headers_too_large")
            )

    def _read_without_upgrade(self, rest: bytes) -> None:
        """Read the last headers again, without the one for which the parser left their body and all else (``rest``)."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(invalid("CONNECT is not served here."))
            return
        headers = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"%s %s HTTP/%s\r\n%s\r\n%s" % (method, self.url, version, headers, rest))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_headers = False
        self._stop_expecting_headers()
        super().on_headers_complete()
        self._requests = (*self._unanswered, self.cycle)

    @property
    def _unanswered(self) -> tuple[RequestResponseCycle, ...]:
        """The requests whose responses are not complete, in order."""
        return tuple(cycle for cycle in self._requests if not cycle.response_complete)

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
        match self._unanswered:
            case (cycle,) if cycle.more_body and not cycle.response_started:
                self._refuse(unavailable("The server is shutting down and takes no new requests."))

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

    def _refuse(self, error: ApiError) -> None:
        body = error.body
        head = b"%scontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (STATUS_LINE[error.status], len(body)) + body)
        self.transport.close()
