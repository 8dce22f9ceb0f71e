"""What the HTTP/1.1 protocol does beside uvicorn's: bytes in, bytes out."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from tests.server.conftest import App, AppFactory
from tests.server.fake_engine import Behaviour

SHORT = {"prompt": "one two", "max_tokens": 2}


def connect(app: App) -> socket.socket:
    url = httpx.URL(app.url)
    assert url.port is not None
    return socket.create_connection((url.host, url.port), timeout=20)


def head(num_bytes: int, *headers: str, version: str = "1.1") -> bytes:
    lines = ("host: x", f"content-length: {num_bytes}", *headers)
    return "".join(f"{line}\r\n" for line in (f"POST /v1/completions HTTP/{version}", *lines, "")).encode()


def post(body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    payload = json.dumps(body).encode()
    return head(len(payload), *headers, version=version) + payload


def receive_all(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


UPGRADES = {
    "h2c": ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAARAAAAAAAIAAAAA"),
    "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"),
}


@pytest.mark.parametrize("is_split", [False, True], ids=["one packet", "body later"])
@pytest.mark.parametrize("name", list(UPGRADES))
def test_a_request_that_asks_for_another_protocol_is_served_in_this_one(app: App, name: str, is_split: bool) -> None:
    request, last = post(SHORT, *UPGRADES[name]), post(SHORT, "connection: close")
    cut = request.index(b"\r\n\r\n") + 4 if is_split else len(request)
    with connect(app) as connection:
        connection.sendall(request[:cut])
        app.http.get("/health")  # the server has read what came before
        connection.sendall(request[cut:] + last)
        answer = receive_all(connection)
    assert answer.count(b"HTTP/1.1 200") == answer.count(b'"text_completion"') == 2


def test_connect_is_refused_in_the_contract_form(app: App) -> None:
    with connect(app) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org:443\r\n\r\n")
        answer = receive_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert "CONNECT" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize("begun", [b"", b"\r\n", post(SHORT)[:40]], ids=["nothing", "an empty line", "a part"])
def test_a_connection_whose_headers_do_not_come_is_closed(
    app: App, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    with connect(app) as used:
        used.sendall(post(SHORT))
        assert used.recv(65536).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr("nextn.server.http_protocol.HEADERS_TIMEOUT", 0.1)
        if begun:  # else this is a connection that may be kept
            used.sendall(begun)
            assert receive_all(used) == b""
    with connect(app) as fresh:
        fresh.sendall(begun)
        assert receive_all(fresh) == b""


def test_headers_may_wait_for_a_response_that_is_under_way(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.05, tokens_per_step=1))
    second = post(SHORT, "connection: close")
    with connect(app) as connection:
        connection.sendall(post({**SHORT, "max_tokens": 20, "stream": True}))
        received = connection.recv(1)
        monkeypatch.setattr("nextn.server.http_protocol.HEADERS_TIMEOUT", 0.1)
        connection.sendall(second[:40])
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            received += connection.recv(65536)
        connection.sendall(second[40:])
        assert receive_all(connection).startswith(b"HTTP/1.1 200")
