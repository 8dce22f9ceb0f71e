"""What the HTTP/1.1 protocol does beside uvicorn's: bytes in, bytes out."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from tests.server.conftest import App

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
