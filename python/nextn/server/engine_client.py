"""The server's view of the engine process: its state, its statistics, and the requests it works on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from nextn.protocol.channel import ServerEnd
from nextn.protocol.draft_health import DraftHealth
from nextn.protocol.messages import (
    Abort,
    AddRequest,
    CallReply,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    FromEngine,
    GetInfo,
    RequestOutput,
    Shutdown,
    StepOutput,
    ToEngine,
)
from nextn.server.errors import invalid, queue_full, unavailable
from nextn.server.inbox import Generation
from nextn.server.metrics import Metrics

logger = logging.getLogger(__name__)

CALL_TIMEOUT = 10.0
"""Seconds that a FlushCache or GetInfo may take: the engine answers between two steps."""


SHUTDOWN_SEND_TIMEOUT = 0.5
"""Seconds to hand over the last message; nobody takes it when the engine died before it connected."""


class EngineState(Enum):
    """LOADING → READY → DRAINING, and DEAD from anywhere."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class _Running:
    """One engine request: where its outputs go, what its HTTP request is called, and the times its metrics need.

    is_probe: metrics do not count it
    """

    __slots__ = ("arrived_at", "generation", "index", "is_probe", "last_output_at", "names", "num_tokens")

    def __init__(
        self, generation: Generation, names: Sequence[str], index: int, now: float, is_probe: bool = False
    ) -> None:
        self.generation = generation
        self.names = names
        self.index = index
        self.is_probe = is_probe
        self.arrived_at = now
        self.last_output_at: float | None = None
        self.num_tokens = 0


class EngineClient:
    """Owns the server's end of the channel. Lives on one event loop; none of its methods is thread-safe."""

    def __init__(self, end: ServerEnd, metrics: Metrics, max_in_flight: int) -> None:
        """max_in_flight: engine requests that can run and wait together; more are refused without asking the engine."""
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self.draft_health: DraftHealth | None = None
        self.state = EngineState.LOADING
        self.failure: EngineFailed | None = None
        self._end = end
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._running: dict[str, _Running] = {}
        self._leaving: Counter[str] = Counter()  # names of aborted requests whose last output has not come yet
        self._leaving_since = 0.0  # when the first of them was aborted
        self._groups: dict[str, Sequence[str]] = {}
        self._calls: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._num_calls = 0
        self._outgoing: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._failed = asyncio.Event()
        self._stepped = asyncio.Event()
        self._heard_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to listen and to send, on the running loop."""
        self._tasks = [asyncio.create_task(self._receive_forever()), asyncio.create_task(self._send_forever())]

    async def wait_for_failure(self, timeout: float) -> None:
        """Return when the engine has said why it failed, or after ``timeout`` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._failed.wait(), timeout)

    async def close(self) -> None:
        """Fail what still runs, tell the engine to leave if it still listens, and release the sockets."""
        self.fail("the server was shut down", kind="unavailable")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.send(Shutdown()), SHUTDOWN_SEND_TIMEOUT)
        self._end.close()

    @property
    def num_running(self) -> int:
        """Engine requests whose last output has not come yet."""
        return len(self._running)

    @property
    def silent_for(self) -> float:
        """Seconds since the engine last said anything while it had something to do, be it to end what nobody wants."""
        waits = [running.arrived_at for running in self._running.values()]
        if self._leaving:
            waits.append(self._leaving_since)
        return time.monotonic() - max(self._heard_at, min(waits)) if waits else 0.0

    def require_ready(self) -> EngineReady:
        """The loaded engine's description, or 503 with the reason why there is none."""
        match self.state:
            case EngineState.LOADING:
                raise unavailable("The model is still loading; try again in a moment.")
            case EngineState.DRAINING:
                raise unavailable("The server is shutting down and takes no new requests.")
            case EngineState.DEAD:
                reason = self.failure.message if self.failure else "unknown"
                raise unavailable(f"The engine has stopped: {reason}")
        assert self.ready is not None
        return self.ready

    async def wait_for_step(self) -> None:
        """Return when the engine has made a step, for whomever; raises ApiError 503 if it is gone."""
        self._stepped.clear()
        await self._stepped.wait()
        self.require_ready()

    def submit(
        self,
        requests: Sequence[AddRequest],
        groups: Mapping[str, Sequence[str]] | None = None,
        min_tokens: int = 1,
        *,
        is_probe: bool = False,
    ) -> Generation:
        """Start the engine requests of one HTTP request.

        groups: names that an abort may use, and the requests that each stands for
        min_tokens: see ``Generation``
        is_probe: nobody's request, so that metrics do not count it
        Raises ApiError: 503 if the engine takes no requests, 429 if it has too many, 400 if a name is in use.
        """
        self.require_ready()
        if len(self._running) + len(requests) > self._max_in_flight:
            raise queue_full(f"{len(self._running)} requests run or wait already; try again later.")
        rids, groups = [request.rid for request in requests], groups or {}
        for name in (*groups, *rids):
            if name in self._groups or name in self._running:
                raise invalid(f"'rid' {name!r:.200} is in use by a request that still runs.", "rid")
        now = time.monotonic()
        generation = Generation(rids, min_tokens, self._release)
        self._groups.update(groups)
        for index, request in enumerate(requests):
            self._running[request.rid] = _Running(generation, tuple(groups), index, now, is_probe)
            self._outgoing.put_nowait(request)
        logger.debug("request submitted rid=%s choices=%d", rids[0], len(requests))
        return generation

    def abort(self, rid: str | None) -> None:
        """End the HTTP request, prompt or single choice of that name, or all (None), with finish_reason "abort"."""
        if rid is None:
            self._outgoing.put_nowait(Abort(None))
            return
        for name in self._groups.get(rid, (rid,)):
            self._outgoing.put_nowait(Abort(name))

    async def flush_cache(self) -> dict[str, Any]:
        self.require_ready()
        return await self._call(FlushCache)

    async def get_info(self) -> dict[str, Any]:
        self.require_ready()
        return await self._call(GetInfo)

    def drain(self) -> None:
        """Take no new requests; those that run go on."""
        if self.state is not EngineState.DEAD:
            self.state = EngineState.DRAINING

    def fail(self, reason: str, *, user_error: bool = False, kind: str = "internal") -> None:
        """The engine is gone: every open choice ends with an error, and no request is taken again."""
        if self.state is EngineState.DEAD:
            return
        if kind == "internal":
            logger.error("engine failed running_requests=%d reason=%s", len(self._running), reason)
        self.state = EngineState.DEAD
        self.failure = EngineFailed(reason, user_error)
        self._failed.set()
        self._stepped.set()
        for rid, running in list(self._running.items()):
            running.generation.deliver(
                running.index,
                RequestOutput(
                    rid=rid,
                    token_ids=[],
                    prompt_tokens=0,
                    completion_tokens=running.num_tokens,
                    finish_reason="error",
                    error=f"The engine has stopped: {reason}",
                    error_kind=kind,
                ),
            )
        for future in self._calls.values():
            if not future.done():
                future.set_exception(unavailable(f"The engine has stopped: {reason}"))

    async def _call(self, kind: type[FlushCache] | type[GetInfo]) -> dict[str, Any]:
        self._num_calls += 1
        call_id = str(self._num_calls)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._outgoing.put_nowait(kind(call_id))
        try:
            return await asyncio.wait_for(future, CALL_TIMEOUT)
        except TimeoutError:
            raise unavailable(f"The engine did not answer within {CALL_TIMEOUT:.0f} s.") from None
        finally:
            del self._calls[call_id]

    def _release(self, rid: str, abort: bool) -> None:
        running = self._running.pop(rid, None)
        if running is None:
            return
        if not running.is_probe:
            self._metrics.observe_end(time.monotonic() - running.arrived_at)
        if abort and self.state is not EngineState.DEAD:
            self._outgoing.put_nowait(Abort(rid))
            if not self._leaving:
                self._leaving_since = time.monotonic()
            self._leaving[rid] += 1
        if running.generation.has_ended:
            for name in running.names:
                del self._groups[name]

    async def _send_forever(self) -> None:
        while True:
            await self._end.send(await self._outgoing.get())

    async def _receive_forever(self) -> None:
        while self.state is not EngineState.DEAD:
            try:
                message = await self._end.receive()
                self._dispatch(message)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("engine channel failed")
                self.fail(f"a message from the engine could not be handled: {error!r}")

    def _dispatch(self, message: FromEngine) -> None:
        self._heard_at = time.monotonic()
        match message:
            case StepOutput():
                if message.stats.num_steps > self.stats.num_steps:
                    self._stepped.set()
                self.stats = message.stats
                for output in message.outputs:
                    self._deliver(output)
            case DraftHealth():
                self.draft_health = message
            case EngineReady():
                self.ready = message
                if self.state is EngineState.LOADING:
                    self.state = EngineState.READY
            case EngineFailed():
                self.fail(message.message, user_error=message.user_error)
            case CallReply():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message.result)

    def _deliver(self, output: RequestOutput) -> None:
        if output.rid in self._leaving:  # not of the request that has the name now: the engine keeps the order
            if output.finish_reason is not None:
                self._leaving[output.rid] -= 1
                if not self._leaving[output.rid]:
                    del self._leaving[output.rid]
            return
        running = self._running.get(output.rid)
        if running is None:
            return
        now = self._heard_at
        num_new = len(output.token_ids)
        if num_new and not running.is_probe:
            if running.last_output_at is None:
                self._metrics.observe_first_token(now - running.arrived_at, output.queue_time)
            else:
                self._metrics.observe_next_tokens(now - running.last_output_at, num_new)
            running.last_output_at = now
            running.num_tokens += num_new
        if output.finish_reason == "abort" and not running.is_probe:
            self._metrics.count_abort()
        running.generation.deliver(running.index, output)
