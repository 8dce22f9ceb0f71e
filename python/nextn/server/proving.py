"""Where grammars wait to be compiled: one after the other, and nothing else with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import ClientDisconnect

from nextn.server.errors import queue_full

T = TypeVar("T")

IsGone = Callable[[], Awaitable[bool]]
"""Whether the client has left."""

MAX_WAITING = 64
"""Requests that wait for their turn; most grammars take milliseconds."""

MAX_WAIT = 10.0
"""Seconds that one of them waits."""


class ProvingLine:
    """Runs one piece of work at a time in a thread of its own. Lives on one event loop."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "grammars")

    async def run(self, work: Callable[[], T], is_gone: IsGone) -> T:
        """What ``work`` gives when its turn has come.

        Raises ApiError 429 if too many wait, or it takes too long; ClientDisconnect if the client has left meanwhile.
        """
        if self.num_waiting >= MAX_WAITING:
            raise queue_full(f"{self.num_waiting} requests wait for a grammar to be compiled; try again later.")
        self.num_waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT):
                await self._turn.acquire()
        except TimeoutError:
            message = f"The grammar was not compiled within {MAX_WAIT:g} s, others being before it; try again later."
            raise queue_full(message) from None
        finally:
            self.num_waiting -= 1
        try:
            if await is_gone():
                raise ClientDisconnect
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._turn.release()
