"""What the HTTP/1.1 protocol does beside uvicorn's: bytes in, bytes out."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

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


def test_pipelined_requests_that_ask_for_another_protocol_are_served_however_many(app: App) -> None:
    num_requests = 1500
    one = "\r\n".join(("GET /health HTTP/1.1", "connection: upgrade", "upgrade: h2c", "", "")).encode()
    with connect(app) as connection:
        connection.sendall(one * num_requests + post(SHORT, "connection: close"))
        answer = receive_all(connection)
    assert answer.count(b"HTTP/1.1 200") == num_requests + 1


def test_a_pipelined_request_costs_the_same_however_many_wait(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    num_requests, num_looks = 1500, 0

    def is_complete(cycle: RequestResponseCycle) -> bool:
        nonlocal num_looks
        num_looks += 1
        return bool(vars(cycle)["is_complete"])

    def set_complete(cycle: RequestResponseCycle, value: bool) -> None:
        vars(cycle)["is_complete"] = value

    monkeypatch.setattr(RequestResponseCycle, "response_complete", property(is_complete, set_complete), raising=False)
    with connect(app) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n" * num_requests + post(SHORT, "connection: close"))
        answer = receive_all(connection)
    assert answer.count(b"HTTP/1.1 200") == num_requests + 1
    assert num_looks < 50 * num_requests


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


def test_no_answer_to_http_1_0_is_chunked(app: App) -> None:
    for stream in (False, True):
        with connect(app) as connection:
            connection.sendall(post({**SHORT, "stream": stream}, version="1.0"))
            headers, _, body = receive_all(connection).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in headers.lower()
        assert (b"content-length: %d" % len(body) in headers.splitlines()) is not stream
    assert body.startswith(b"data: {")
    assert body.endswith(b"}\n\ndata: [DONE]\n\n")


def test_a_client_that_sends_its_whole_body_first_learns_that_it_is_too_large(make_app: AppFactory) -> None:
    app = make_app("--max-body-bytes", "1024")
    request = urllib.request.Request(f"{app.url}/v1/completions", data=b"x" * 8 * 2**20)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 413
    assert json.load(refused.value)["error"]["code"] == "request_too_large"


def test_a_refused_body_is_not_taken_for_ever(make_app: AppFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextn.server.http_protocol.MAX_IGNORED_BYTES", 2**20)
    app = make_app("--max-body-bytes", "1024")
    with connect(app) as connection:
        connection.sendall(head(2**40))
        with pytest.raises(ConnectionError):
            connection.sendall(b"x" * 48 * 2**20)


@pytest.mark.parametrize("first", [b"", post(SHORT)], ids=["alone", "with another request"])
def test_garbage_behind_a_request_does_not_spoil_its_response(make_app: AppFactory, first: bytes) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.02, tokens_per_step=1))
    with connect(app) as connection:
        connection.sendall(first + post({**SHORT, "max_tokens": 20, "stream": True}))
        received = b""
        while b"data: " not in received:
            received += connection.recv(65536)
        connection.sendall(b"\0garbage\r\n\r\n")
        received += receive_all(connection)
    assert received.count(b"HTTP/1.1 ") == received.count(b"HTTP/1.1 200") == (2 if first else 1)
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_body_that_is_not_http_is_refused_and_does_not_spoil_the_response_before_it(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.02, tokens_per_step=1))
    broken = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno size\r\n"
    with connect(app) as alone:
        alone.sendall(broken)
        assert receive_all(alone).startswith(b"HTTP/1.1 400")
    with connect(app) as behind:
        behind.sendall(post({**SHORT, "max_tokens": 20, "stream": True}) + broken)
        received = receive_all(behind)
    assert received.count(b"HTTP/1.1 ") == received.count(b"HTTP/1.1 200") == 1
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
