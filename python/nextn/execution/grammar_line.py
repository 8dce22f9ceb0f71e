"""Requests that wait for their grammar. A thread compiles it, up to some seconds, and the steps of others go on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

import msgspec
from llguidance import LLMatcher

from nextn.errors import RequestError
from nextn.execution.engine import Engine
from nextn.execution.outputs import refusal
from nextn.protocol.messages import AddRequest, EngineStats, RequestOutput

PATIENCE = 0.005
"""Seconds that a step may wait for a grammar. Most take less to compile, or are known."""


class GrammarLine:
    """Stands before an engine: what is added here gets there with its grammar compiled, others at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._waiting: dict[str, tuple[AddRequest, Future[LLMatcher]]] = {}

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def add(self, request: AddRequest) -> list[RequestOutput]:
        """As ``Engine.add``, now or when the grammar is compiled."""
        if request.rid in self._waiting:
            return [refusal(request, "invalid", f"rid: {request.rid!r} is in use by a running request; choose another")]
        if request.grammar is None:
            return _as_list(self._engine.add(request))
        known = self._engine.known_grammar(request.grammar)
        if known is not None:
            return _as_list(self._engine.add(request, known))
        compiled = self._thread.submit(self._engine.compile_grammar, request.grammar)
        if not self._waiting:
            wait([compiled], PATIENCE)
        self._waiting[request.rid] = (request, compiled)
        return self.admit()

    def admit(self) -> list[RequestOutput]:
        """Add those whose grammar is compiled by now. Returns the terminal outputs of those that are refused."""
        outputs: list[RequestOutput] = []
        for rid in [rid for rid, (_, compiled) in self._waiting.items() if compiled.done()]:
            request, compiled = self._waiting.pop(rid)
            try:
                matcher = compiled.result()
            except RequestError as error:
                outputs.append(refusal(request, "invalid", str(error)))
            else:
                outputs += _as_list(self._engine.add(request, matcher))
        return outputs

    def abort(self, rid: str | None) -> list[RequestOutput]:
        """As ``Engine.abort``, also of those that wait."""
        outputs: list[RequestOutput] = []
        for waiting in list(self._waiting) if rid is None else [rid] if rid in self._waiting else []:
            request, compiled = self._waiting.pop(waiting)
            compiled.cancel()
            outputs += _as_list(self._engine.add(msgspec.structs.replace(request, grammar=None)))
        return outputs + self._engine.abort(rid)

    def stats(self) -> EngineStats:
        """Those of the engine; who waits here is queued as well."""
        stats = self._engine.stats()
        return msgspec.structs.replace(stats, num_queued=stats.num_queued + len(self))

    def close(self) -> None:
        """Nothing can be added afterwards, and what waits is not compiled: the process could not end before."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _as_list(output: RequestOutput | None) -> list[RequestOutput]:
    return [] if output is None else [output]
