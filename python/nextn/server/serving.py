"""Run the HTTP server around an engine process: supervise it, drain on request, and end with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

HURRIED_FLUSH_TIMEOUT = 0.5
"""The same after a second signal."""


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

    def cut(self) -> None:
        """End what is still under way: responses that nobody reads break off, requests without one are cancelled."""
        for connection in list(self.server_state.connections):
            assert isinstance(connection, CappedHttpProtocol)
            connection.cut()
        for task in self.server_state.tasks:
            task.cancel()


class _Threads(ThreadPoolExecutor):
    """The event loop's threads. The end does not wait for what they still do: it is for nobody, and may take long."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


async def serve(app: ASGIApp, client: EngineClient, listener: socket.socket, watch: Supervision) -> str | None:
    """Serve until a signal asks to stop (returns None) or the engine fails (returns the reason).

    A first signal drains; a second ends the running requests at once.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(_Threads())
    stop, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
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
            await _drain(client, server, serving, hurry, watch.shutdown_timeout)
        client.fail(reason or "the server was shut down", kind="internal" if reason else "unavailable")
        return reason
    finally:
        server.should_exit = True
        flush_timeout = HURRIED_FLUSH_TIMEOUT if hurry.is_set() else FLUSH_TIMEOUT
        await asyncio.wait((serving,), timeout=flush_timeout)
        server.cut()
        server.force_exit = True
        await client.close()
        await asyncio.wait((serving, *server.server_state.tasks), timeout=flush_timeout)


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


async def _drain(
    client: EngineClient, server: _Server, serving: asyncio.Task[None], hurry: asyncio.Event, timeout: float
) -> None:
    """Stop accepting, and let running requests finish and their clients read, for at most ``timeout`` seconds."""
    client.drain()
    server.should_exit = True
    logger.info("shutting down running_requests=%d timeout_s=%g", client.num_running, timeout)
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait((serving, hurried), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not serving.done() and not hurry.is_set():
        logger.warning("shutdown timeout reached running_requests=%d", client.num_running)
