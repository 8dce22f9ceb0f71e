"""An engine that speaks the real protocol over the real sockets and computes nothing.

It makes, on demand, the faults that a real engine makes only by accident: death, silence, a full queue, an error.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nextn.config.engine_config import EngineConfig
from nextn.protocol.channel import EngineEnd
from nextn.protocol.draft_health import DraftHealth
from nextn.protocol.messages import (
    Abort,
    AddRequest,
    CallReply,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    GetInfo,
    RequestOutput,
    Shutdown,
    SpecStep,
    StepOutput,
    TokenLogprobs,
)

VOCAB_SIZE = 2560
EOS = 2528
CONTEXT_LENGTH = 512


@dataclass(kw_only=True)
class Behaviour:
    """What the fake does; a test may change it while it runs.

    script: the tokens to generate for every request, then EOS; None repeats the prompt for ever
    queue_limit: requests that it has at most; it refuses others
    batch_limit: the first of them that a step works on; the others wait
    """

    script: list[int] | None = None
    tokens_per_step: int = 2
    step_seconds: float = 0.001
    load_seconds: float = 0.0
    fail_loading: str | None = None
    queue_limit: int | None = None
    batch_limit: int | None = None
    die_after_tokens: int | None = None
    hang_after_tokens: int | None = None
    draft_health: DraftHealth | None = None
    error_after_tokens: int | None = None


@dataclass
class Sequence:
    """One request as the fake sees it."""

    request: AddRequest
    num_generated: int = 0
    num_steps: int = 0

    def next_tokens(self, script: list[int] | None, count: int) -> list[int]:
        source = script if script is not None else self.request.input_ids
        ids: list[int] = []
        for position in range(self.num_generated, self.num_generated + count):
            if script is not None and position >= len(script):
                ids.append(EOS)
                break
            ids.append(source[position % len(source)])
        return ids[: self.request.sampling.max_new_tokens - self.num_generated]


@dataclass
class FakeEngine:
    """Serve one channel until told to stop. ``log`` keeps every message that came."""

    directory: Path
    behaviour: Behaviour = field(default_factory=Behaviour)
    should_stop: Callable[[], bool] = lambda: False
    log: list[object] = field(default_factory=list)
    running: dict[str, Sequence] = field(default_factory=dict)
    num_tokens: int = 0
    num_steps: int = 0

    def reset(self, behaviour: Behaviour) -> None:
        """Behave so from now on, and forget what was."""
        self.behaviour = behaviour
        self.log.clear()
        self.num_tokens = self.num_steps = 0

    def run(self) -> None:
        end = EngineEnd(self.directory)
        time.sleep(self.behaviour.load_seconds)
        if self.behaviour.fail_loading:
            end.send(EngineFailed(self.behaviour.fail_loading, user_error=True))
            end.close()
            return
        end.send(
            EngineReady(
                model={"name": "fake"},
                max_total_tokens=100_000,
                context_length=CONTEXT_LENGTH,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=[EOS],
                load_seconds=self.behaviour.load_seconds,
            )
        )
        if self.behaviour.draft_health is not None:
            end.send(self.behaviour.draft_health)
        while not self.should_stop():
            outputs: list[RequestOutput] = []
            messages = end.receive(0 if self.running else 20)
            for message in messages:
                self.log.append(message)
                if isinstance(message, Shutdown):
                    end.close()
                    return
                outputs += self._handle(end, message)
            if self._is_past(self.behaviour.die_after_tokens):
                os._exit(7)
            if self._is_past(self.behaviour.hang_after_tokens):
                time.sleep(0.01)
                continue
            if self.running:
                time.sleep(self.behaviour.step_seconds)
                outputs += self._step()
            if outputs:
                end.send(StepOutput(outputs, self.stats()))
        end.close()

    def _is_past(self, limit: int | None) -> bool:
        return limit is not None and self.num_tokens >= limit

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_pages=100,
            num_free_pages=100 - len(self.running),
            page_size=16,
            generation_tokens=self.num_tokens,
            num_steps=self.num_steps,
            num_verify_passes=self.num_steps,
            drafted_per_position=[self.num_steps],
            accepted_per_position=[self.num_steps],
        )

    def _handle(self, end: EngineEnd, message: object) -> list[RequestOutput]:
        match message:
            case AddRequest():
                limit = self.behaviour.queue_limit
                if limit is not None and len(self.running) >= limit:
                    return [self._ended(message, "error", "the queue is full", "queue_full")]
                self.running[message.rid] = Sequence(message)
            case Abort(rid=rid):
                names = list(self.running) if rid is None else [rid] if rid in self.running else []
                return [self._ended(self.running.pop(name).request, "abort", None, None) for name in names]
            case FlushCache(call_id=call_id):
                end.send(CallReply(call_id, {"flushed": not self.running}))
            case GetInfo(call_id=call_id):
                end.send(CallReply(call_id, {"name": "fake"}))
        return []

    def _ended(self, request: AddRequest, reason: str, error: str | None, kind: str | None) -> RequestOutput:
        return RequestOutput(
            rid=request.rid,
            token_ids=[],
            prompt_tokens=len(request.input_ids),
            completion_tokens=0,
            finish_reason=reason,  # type: ignore[arg-type]
            error=error,
            error_kind=kind,
        )

    def _step(self) -> list[RequestOutput]:
        self.num_steps += 1
        outputs = []
        for rid, sequence in list(self.running.items())[: self.behaviour.batch_limit]:
            if self._is_past(self.behaviour.error_after_tokens):
                del self.running[rid]
                outputs.append(self._ended(sequence.request, "error", "a kernel failed", "internal"))
            else:
                outputs.append(self._extend(rid, sequence))
        return outputs

    def _extend(self, rid: str, sequence: Sequence) -> RequestOutput:
        request = sequence.request
        ids = sequence.next_tokens(self.behaviour.script, self.behaviour.tokens_per_step)
        first = sequence.num_generated == 0
        sequence.num_generated += len(ids)
        sequence.num_steps += 1
        self.num_tokens += len(ids)
        stopping = ids[-1] == EOS and not request.sampling.ignore_eos
        over = stopping or sequence.num_generated >= request.sampling.max_new_tokens
        if over:
            del self.running[rid]
        top = request.num_top_logprobs
        start = request.prompt_logprobs_start
        return RequestOutput(
            rid=rid,
            token_ids=ids,
            prompt_tokens=len(request.input_ids),
            completion_tokens=sequence.num_generated,
            cached_tokens=1,
            logprobs=None if top is None else [_logprobs(token_id, top) for token_id in ids],
            prompt_logprobs=None if start is None or not first else _prompt_logprobs(request, start),
            finish_reason=("stop" if stopping else "length") if over else None,
            stop_token_id=EOS if stopping else None,
            spec_verify_ct=sequence.num_steps,
            num_drafted=3 * sequence.num_steps,
            num_accepted=sequence.num_generated - sequence.num_steps,
            spec_steps=[SpecStep(3, len(ids) - 1, len(ids))],
        )


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, [((token_id + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_top)])


def _prompt_logprobs(request: AddRequest, start: int) -> list[TokenLogprobs]:
    top = request.num_top_logprobs or 0
    found = [_logprobs(token_id, top) for token_id in request.input_ids[start:]]
    return [TokenLogprobs(found[0].token_id, None), *found[1:]] if start == 0 and found else found


def start_in_thread(directory: Path, behaviour: Behaviour) -> tuple[FakeEngine, threading.Thread, threading.Event]:
    """A fake in this process, for tests of the HTTP application alone."""
    stop = threading.Event()
    engine = FakeEngine(directory, behaviour, stop.is_set)
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    return engine, thread, stop


def run_fake_engine(
    engine_config: EngineConfig, socket_dir: str, parent_pid: int, num_threads: int | None, log_level: str
) -> None:
    """A fake as an engine process; its behaviour comes from the environment, as ``name=value`` pairs."""
    pairs = dict(pair.split("=") for pair in os.environ.get("FAKE_ENGINE", "").split(",") if pair)
    values = {name: value if name == "fail_loading" else float(value) for name, value in pairs.items()}
    behaviour = Behaviour(**values)  # type: ignore[arg-type]
    behaviour.tokens_per_step = int(behaviour.tokens_per_step)
    FakeEngine(Path(socket_dir), behaviour, lambda: os.getppid() != parent_pid).run()
