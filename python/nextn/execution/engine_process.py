"""The engine behind its socket: one process that receives requests, steps, and sends what each step produced."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import closing
from pathlib import Path

from nextn.config.engine_config import EngineConfig
from nextn.config.ranks import RankPlace
from nextn.errors import NextnError, PeerLost
from nextn.execution.engine import Engine
from nextn.execution.grammar_line import GrammarLine
from nextn.execution.rank_process import configure_logging, end_as_lost, end_with_parent, joined
from nextn.execution.threads import set_num_threads
from nextn.protocol.channel import EngineEnd
from nextn.protocol.messages import (
    Abort,
    AddRequest,
    CallReply,
    EngineFailed,
    EngineReady,
    FlushCache,
    GetInfo,
    RequestOutput,
    Shutdown,
    StepOutput,
    ToEngine,
)

IDLE_POLL_MS = 500
"""How often an idle engine looks whether its parent still lives."""

COMPILING_POLL_MS = 1
"""How often it looks while a grammar is compiled."""

STILL_HERE_SECONDS = 1.0
"""How often an idle engine tells the other ranks that it is there, and so learns whether they are."""

logger = logging.getLogger(__name__)


def run_engine(
    engine_config: EngineConfig,
    socket_dir: str,
    parent_pid: int,
    num_threads: int | None,
    log_level: str,
    place: RankPlace | None = None,
) -> None:
    """Entry point of the engine process: load, say ready, serve until told to stop or the parent is gone.

    place: of rank 0 among several; None alone
    """
    place = place or RankPlace()
    configure_logging("engine", log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides what ends when
    if place.size > 1:
        end_with_parent(parent_pid)
    end = EngineEnd(Path(socket_dir))
    try:
        set_num_threads(engine_config.model_path, num_threads, place.ranks_per_node)
        with joined(engine_config, place) as tp:
            engine = Engine(engine_config, tp)
            end.send(
                EngineReady(
                    model=engine.info(),
                    max_total_tokens=engine.stats().num_pages * engine.stats().page_size,
                    context_length=engine.context_length,
                    vocab_size=engine.vocab_size,
                    eos_token_ids=list(engine.eos_token_ids),
                    load_seconds=engine.load_seconds,
                )
            )
            with closing(GrammarLine(engine)) as line:
                _serve(engine, line, end, parent_pid)
            engine.close()
    except PeerLost as error:
        end.close()
        end_as_lost(error)
    except NextnError as error:
        end.send(EngineFailed(str(error), user_error=True))
    except Exception as error:
        logger.exception("the engine failed")
        end.send(EngineFailed(f"{type(error).__name__}: {error}"))
    finally:
        end.close()


def _serve(engine: Engine, line: GrammarLine, end: EngineEnd, parent_pid: int) -> None:
    end.send(engine.draft_health())
    told = engine.health_revision
    heard_at = time.monotonic()
    while os.getppid() == parent_pid:
        is_busy = engine.has_work or engine.has_background_work
        messages = end.receive(0 if is_busy else COMPILING_POLL_MS if line else IDLE_POLL_MS)
        outputs = line.admit()
        for message in messages:
            if isinstance(message, Shutdown):
                end.send(StepOutput(outputs + line.abort(None), line.stats()))
                return
            outputs += _handle(engine, line, end, message)
        has_worked = engine.has_work
        outputs += engine.step()
        # Also without outputs: a long prompt's chunks show that the engine is alive.
        if has_worked or messages or outputs:
            end.send(StepOutput(outputs, line.stats()))
        engine.work_in_background()
        now = time.monotonic()
        if has_worked:
            heard_at = now
        elif now - heard_at > STILL_HERE_SECONDS:
            engine.still_here()
            heard_at = now
        if engine.health_revision != told:
            end.send(engine.draft_health())
            told = engine.health_revision


def _handle(engine: Engine, line: GrammarLine, end: EngineEnd, message: ToEngine) -> list[RequestOutput]:
    match message:
        case AddRequest():
            return line.add(message)
        case Abort(rid):
            return line.abort(rid)
        case FlushCache(call_id):
            end.send(CallReply(call_id, {"flushed_pages": engine.flush_cache()}))
        case GetInfo(call_id):
            end.send(CallReply(call_id, engine.info()))
        case Shutdown():
            raise AssertionError("Shutdown ends the loop before this")
    return []
