"""Run the HTTP server around an engine process: supervise it, drain on request, and end with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from nextn.protocol.messages import EngineReady
from nextn.server.engine_client import EngineClient, EngineState
from nextn.server.http_protocol import CappedHttpProtocol

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.1
LAST_WORDS_TIMEOUT = 0.5
"""Seconds that the last message of an engine that is gone may still be on the way."""

FLUSH_TIMEOUT = 2.0
"""Seconds that responses get to write their error event after the engine is gone."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What the supervisor watches, in seconds, and whom it tells.

    why_engine_ended: the reason once a process of the engine is gone, else None
    """

    startup_timeout: float
    shutdown_timeout: float
    watchdog_timeout: float
    why_engine_ended: Callable[[], str | None]
    announce: Callable[[EngineReady], None]


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the supervisor has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: ASGIApp, client: EngineClient, listener: socket.socket, watch: Supervision) -> str | None:
    """Serve until a signal asks to stop (returns None) or the engine fails (returns the reason).

    A first signal drains; a second ends the running requests at once.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    config = uvicorn.Config(
        app,
        http=CappedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
    )
    server = _Server(config)
    client.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        reason = await _supervise(client, serving, stop, watch)
        if reason is None:
            await _drain(client, server, hurry, watch.shutdown_timeout)
        client.fail(reason or "the server was shut down", kind="internal" if reason else "unavailable")
        return reason
    finally:
        server.should_exit = True
        await asyncio.wait((serving,), timeout=FLUSH_TIMEOUT)
        server.force_exit = True
        await client.close()
        await asyncio.wait((serving,), timeout=FLUSH_TIMEOUT)


async def _supervise(
    client: EngineClient, serving: asyncio.Task[None], stop: asyncio.Event, watch: Supervision
) -> str | None:
    """Return None when asked to stop, or why the server cannot go on."""
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    announced = False
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL_INTERVAL)
        if client.ready is not None and not announced:
            watch.announce(client.ready)
            announced = True
        if serving.done():
            return f"the HTTP server stopped: {serving.exception() or 'no reason given'}"
        end_of_engine = watch.why_engine_ended()
        if end_of_engine is not None:
            await client.wait_for_failure(LAST_WORDS_TIMEOUT)
        if client.failure is not None:
            return client.failure.message
        if end_of_engine is not None:
            return watch.why_engine_ended()
        if client.state is EngineState.LOADING and loop.time() - started_at > watch.startup_timeout:
            return f"the model was not loaded within --startup-timeout {watch.startup_timeout:g} s"
        if client.silent_for > watch.watchdog_timeout:
            return f"the engine made no step within --watchdog-timeout {watch.watchdog_timeout:g} s"
    return None


async def _drain(client: EngineClient, server: _Server, hurry: asyncio.Event, timeout: float) -> None:
    """Stop accepting and let running requests finish, for at most ``timeout`` seconds."""
    client.drain()
    server.should_exit = True
    logger.info("shutting down running_requests=%d timeout_s=%g", client.num_running, timeout)
    deadline = asyncio.get_running_loop().time() + timeout
    while client.num_running and not hurry.is_set():
        if asyncio.get_running_loop().time() > deadline:
            logger.warning("shutdown timeout reached running_requests=%d", client.num_running)
            return
        await asyncio.sleep(POLL_INTERVAL / 2)
