"""Clients that leave, clients that read slowly, and many clients at once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from nextn.protocol.messages import Abort

from tests.server.conftest import App, AppFactory, wait_until
from tests.server.fake_engine import Behaviour

LONG = {"sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}


def open_connection(base_url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request over a bare socket, which can be closed at any moment."""
    url = httpx.URL(base_url)
    assert url.port is not None
    payload = json.dumps(body).encode()
    connection = socket.create_connection((url.host, url.port), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    connection.sendall(head.encode() + payload)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_the_engine_within_a_step(make_app: AppFactory, path: str, stream: bool) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.05, tokens_per_step=1), fresh=True)
    bodies: dict[str, dict[str, Any]] = {
        "/generate": {"text": "x", **LONG},
        "/v1/completions": {"prompt": "x", "max_tokens": 400, "n": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300},
    }
    connection = open_connection(app.url, path, {**bodies[path], "stream": stream})
    wait_until(lambda: app.engine.num_tokens >= 2)
    connection.close()
    left_at = app.engine.num_steps
    app.wait_until_idle()
    assert app.engine.num_steps - left_at <= 2
    assert sum(isinstance(message, Abort) for message in app.engine.log) == len(app.added)
    text = app.http.get("/metrics").text
    assert "nextn:num_aborted_requests_total 1.0" in text


def test_a_client_that_leaves_before_the_first_token_frees_the_engine(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(hang_after_tokens=0))
    connection = open_connection(app.url, "/generate", {"text": "x", **LONG})
    wait_until(lambda: bool(app.engine.running))
    assert app.engine.num_tokens == 0
    connection.close()
    app.wait_until_idle()
    assert [message.rid for message in app.engine.log if isinstance(message, Abort)] == [app.added[0].rid]
    assert app.services.engine.num_running == 0


def test_a_client_that_leaves_before_its_body_has_come_is_no_failure_of_the_server(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    connection = socket.create_connection((httpx.URL(app.url).host, httpx.URL(app.url).port or 0), timeout=10)
    connection.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"prompt": ')
    app.http.get("/health")  # the server has read what came before
    connection.close()
    app.http.get("/health")
    assert not caplog.records


def test_a_client_that_leaves_its_stream_frees_the_engine_also_with_another_request_in_the_pipeline(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.05, tokens_per_step=1))
    connection = open_connection(app.url, "/generate", {"text": "x", "stream": True, **LONG})
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    wait_until(lambda: app.engine.num_tokens >= 2)
    connection.close()
    left_at = app.engine.num_steps
    app.wait_until_idle()
    assert app.engine.num_steps - left_at <= 2
    assert [record.getMessage() for record in caplog.records] == []


def test_a_client_that_does_not_read_costs_no_queue(make_app: AppFactory) -> None:
    """What one slow client leaves unread is merged into one pending output, and nobody else waits for it."""
    app = make_app(behaviour=Behaviour(step_seconds=0.0, tokens_per_step=1))
    text = "word " * 200
    url = httpx.URL(app.url)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert url.port is not None
    slow.connect((url.host, url.port))
    num_prompt = len(app.services.require_tokenizer().encode(text))
    body = {"text": text, "stream": True, "sampling_params": {"max_new_tokens": 500 - num_prompt, "n": 8}}
    payload = json.dumps(body | {"return_logprob": True, "top_logprobs_num": 5}).encode()
    slow.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(payload) + payload)
    wait_until(lambda: bool(app.engine.log) and not app.engine.running)
    quick = app.http.post("/generate", json={"text": "x", "sampling_params": {"max_new_tokens": 2}})
    assert quick.status_code == 200
    received = b""
    slow.settimeout(10)
    while b"[DONE]" not in received[-100:]:
        received += slow.recv(1 << 20)
    slow.close()
    ends = [line for line in received.split(b"\n") if b'"type":"length"' in line]
    assert len(ends) == 8
    assert received.count(b"data: ") < 8 * (500 - num_prompt) / 2, "nothing was merged"


def test_many_streams_at_once_all_get_their_own_tokens(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.002))

    async def one(client: httpx.AsyncClient, index: int) -> list[int]:
        body = {"input_ids": [index, index + 1], "stream": True, "sampling_params": {"max_new_tokens": 50}}
        response = await client.post("/generate", json=body)
        last = [line for line in response.text.splitlines() if line][-2]
        ids: list[int] = json.loads(last.removeprefix("data: "))["output_ids"]
        return ids

    async def run() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=app.url, timeout=30) as client:
            return await asyncio.gather(*(one(client, index) for index in range(32)))

    for index, ids in enumerate(asyncio.run(run())):
        assert ids == [index, index + 1] * 25


def test_a_request_in_flight_when_the_engine_fails_ends_with_an_error(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.01), fresh=True)
    answers: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        answers.append(app.http.post("/generate", json={"text": "x", "stream": stream, **LONG}))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_until(lambda: app.engine.num_tokens >= 8)
    app.run_in_server(lambda: app.services.engine.fail("the engine process was killed by SIGKILL"))
    for thread in threads:
        thread.join(5)
    whole, streamed = sorted(answers, key=lambda answer: -answer.status_code)
    assert whole.status_code == 500
    assert "SIGKILL" in whole.json()["error"]["message"]
    last = [line for line in streamed.text.splitlines() if line][-1]
    assert "SIGKILL" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert app.http.get("/health").status_code == 503
    late = app.http.post("/generate", json={"text": "x"})
    assert late.status_code == 503
    assert "SIGKILL" in late.json()["error"]["message"]


WORDS = "The quick brown fox jumps over the lazy dog. "
TOOL = {"type": "function", "function": {"name": "f", "description": WORDS * 20_000}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": WORDS * 20_000}),
        ("/v1/completions", {"prompt": [WORDS * 100] * 200}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}),
        ("/tokenize", {"prompt": [WORDS * 100] * 200}),
        ("/detokenize", {"tokens": [40] * 1_000_000}),
    ],
    ids=["a long prompt", "many prompts", "long tools", "tokenize", "detokenize"],
)
def test_a_long_text_does_not_hold_up_other_requests(app: App, path: str, body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()

    async def measure() -> float:
        """The share of the request's time that the slowest of other requests takes meanwhile."""
        longest = 0.0
        async with httpx.AsyncClient(base_url=app.url, timeout=60, verify=False) as client:
            begun_at = time.monotonic()
            long = asyncio.create_task(client.post(path, content=payload))
            while not long.done():
                sent_at = time.monotonic()
                await client.get("/health")
                longest = max(longest, time.monotonic() - sent_at)
            return longest / (time.monotonic() - begun_at)

    # about 0.1 on a quiet machine; always 1 where the server does nothing else
    assert min(asyncio.run(measure()) for _ in range(3)) < 0.4


def test_keep_alive_connections_serve_request_after_request(app: App) -> None:
    started = time.monotonic()
    with app.http as client:
        for _ in range(20):
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - started < 5
