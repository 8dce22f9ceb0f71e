"""The outputs of one HTTP request on their way from the engine to the response that writes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from nextn.protocol.messages import RequestOutput


class Generation:
    """What the engine said about the requests (choices) of one HTTP request, not yet read by its response.

    Outputs of one choice are merged while nobody reads them, so that a slow client costs one pending output per choice
    and never a queue. Each choice yields exactly one output with a ``finish_reason``, and it is that choice's last.

    rids: the engine's name of each choice, in order
    min_tokens: wake the reader only when a choice has that many new tokens, has its first, or has ended
    release: called once per choice, when it is over: (rid, abort) with abort true if the engine must still stop it
    """

    def __init__(self, rids: Sequence[str], min_tokens: int, release: Callable[[str, bool], None]) -> None:
        self._rids = tuple(rids)
        self._min_tokens = min_tokens
        self._release = release
        self._open = dict.fromkeys(range(len(rids)))
        self._begun = [False] * len(rids)
        self._pending: dict[int, RequestOutput] = {}
        self._due = False
        self._wakeup: asyncio.Future[None] | None = None

    @property
    def has_ended(self) -> bool:
        """True when every choice has ended, read or not."""
        return not self._open

    @property
    def is_over(self) -> bool:
        """True when every choice has ended and every output was read."""
        return not self._open and not self._pending

    def deliver(self, index: int, output: RequestOutput) -> None:
        """Take an output of choice ``index`` from the engine."""
        if index not in self._open:
            return
        merged = merge(self._pending.get(index), output)
        self._pending[index] = merged
        if output.finish_reason is not None:
            self._end(index, abort=False)
        if not self._begun[index] or output.finish_reason is not None or len(merged.token_ids) >= self._min_tokens:
            self._begun[index] = True
            self._due = True
            if self._wakeup is not None and not self._wakeup.done():
                self._wakeup.set_result(None)

    async def receive(self) -> list[tuple[int, RequestOutput]]:
        """All that came since the last call, at most one output per choice; waits for the first."""
        while not self._due:
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        received = list(self._pending.items())
        self._pending.clear()
        self._due = False
        return received

    def stop(self, index: int) -> None:
        """End one choice early, for instance at a stop string: nothing more of it will be received."""
        if index in self._open:
            self._end(index, abort=True)
        self._pending.pop(index, None)

    def close(self) -> None:
        """Stop every choice that still runs. Call it when the response is over, however it ended."""
        for index in list(self._open):
            self.stop(index)

    def _end(self, index: int, abort: bool) -> None:
        del self._open[index]
        self._release(self._rids[index], abort)


def merge(old: RequestOutput | None, new: RequestOutput) -> RequestOutput:
    """One output that says what two consecutive ones say. Takes over the lists of ``old``."""
    if old is None:
        return new
    old.token_ids.extend(new.token_ids)
    old.spec_steps.extend(new.spec_steps)
    logprobs = old.logprobs
    if logprobs is not None:
        logprobs.extend(new.logprobs or ())
    return msgspec.structs.replace(
        new,
        token_ids=old.token_ids,
        spec_steps=old.spec_steps,
        logprobs=new.logprobs if logprobs is None else logprobs,
        prompt_logprobs=old.prompt_logprobs or new.prompt_logprobs,
    )
