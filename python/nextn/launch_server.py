"""``python -m nextn.launch_server``: from arguments to a running server, and back to an exit code.

With several ranks, each is a process beside the server; a node that is not the first runs its ranks alone.
Exit codes: 0 after SIGINT or SIGTERM, 1 when the server cannot start or its engine fails, 2 for wrong arguments.
Heavy imports are inside functions: the engine process imports this module too, and needs none of them.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nextn.errors import ConfigError, NextnError
from nextn.execution.ranks import EngineEntry, RankProcesses, places_of_node

if TYPE_CHECKING:
    from nextn.config.server_args import ServerArgs
    from nextn.protocol.channel import ServerEnd
    from nextn.protocol.messages import EngineReady

logger = logging.getLogger("nextn.launch_server")

ENGINE_EXIT_TIMEOUT = 5.0
"""Seconds for the engine's processes to leave after they were told to, before they are killed."""

NODE_POLL_INTERVAL = 0.1


class Stopped(Exception):
    """SIGTERM or SIGINT came before the server could drain in an orderly way."""


def main(argv: Sequence[str] | None = None, engine_entry: EngineEntry | None = None) -> int:
    """Run the server until a signal or a failure; returns the exit code.

    engine_entry: the function that the engine process runs; None is the real engine
    """
    from nextn.config.server_args import ServerArgs
    from nextn.server.listening import listen
    from nextn.server.logs import configure_logging

    try:
        args = ServerArgs.from_cli(sys.argv[1:] if argv is None else argv, os.environ)
    except ConfigError as error:
        return _complain(str(error), 2)
    configure_logging(args.log_level)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_stopped)
    try:
        if args.node_rank > 0:
            return _follow(args)
        with listen(args.host, args.port) as listener:
            return _run(args, listener, engine_entry)
    except NextnError as error:
        return _complain(str(error), 1)
    except Stopped:
        return 0


def _run(args: ServerArgs, listener: socket.socket, engine_entry: EngineEntry | None) -> int:
    """Start the engine's processes, serve around them, and leave neither them nor their socket directory behind."""
    from nextn.protocol.channel import ServerEnd, private_socket_dir

    model_path = resolve_model(args.model_path)
    socket_dir = private_socket_dir()
    end = ServerEnd(socket_dir)  # bound before the engine starts, so that even its last words arrive
    engine: RankProcesses | None = None
    grace = 0.0
    try:
        engine = _spawn(args, model_path, socket_dir, engine_entry)
        reason, is_engine_well = _serve(args, model_path, end, listener, engine)
        grace = ENGINE_EXIT_TIMEOUT if is_engine_well else 0.0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if engine is not None and not engine.end(grace) and grace:
            logger.warning("the engine did not leave within %g s and was killed", grace)
        end.close()
        shutil.rmtree(socket_dir, ignore_errors=True)
    return 0 if reason is None else _complain(reason, 1)


def _follow(args: ServerArgs) -> int:
    """Run the ranks of a node that is not the first, until they end or one of them fails."""
    model_path = resolve_model(args.model_path)
    ranks = _spawn(args, model_path, None)
    try:
        while not ranks.have_ended_well:
            time.sleep(NODE_POLL_INTERVAL)
            if ranks.why_ended(well=False) is not None:
                time.sleep(NODE_POLL_INTERVAL)  # the rank that took others with it may be the last to be gone
                return _complain(ranks.why_ended(well=False) or "a rank ended", 1)
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        ranks.end(0)


def resolve_model(model_path: str | None) -> str:
    """A folder on this machine: the embedded model for None, else the folder itself or a download of a hub name."""
    if model_path is None:
        from nextn.demo import checkpoint_dir

        return str(checkpoint_dir())
    from nextn.checkpoint.hub import resolve_model as resolve

    return str(resolve(model_path))


def _spawn(
    args: ServerArgs, model_path: str, socket_dir: Path | None, engine_entry: EngineEntry | None = None
) -> RankProcesses:
    """The processes of this node's ranks. socket_dir: where rank 0 meets the server; None on other nodes"""
    rendezvous = f"tcp://{args.dist_init_addr}" if args.dist_init_addr else f"file://{socket_dir}/rendezvous"
    places = places_of_node(
        args.tp_size,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        rendezvous=rendezvous,
        timeout=max(args.startup_timeout, args.watchdog_timeout),
    )
    processes = RankProcesses(
        places,
        args.engine_config(model_path),
        socket_dir=None if socket_dir is None else str(socket_dir),
        num_threads=args.num_threads,
        log_level=args.log_level,
        engine_entry=engine_entry,
    )
    for place, pid in zip(places, processes.pids, strict=True):
        logger.info("engine process started rank=%d pid=%d model=%s", place.rank, pid, model_path)
    return processes


def _serve(
    args: ServerArgs, model_path: str, end: ServerEnd, listener: socket.socket, engine: RankProcesses
) -> tuple[str | None, bool]:
    """Serve until asked to stop (None) or until the engine fails (the reason); also: does the engine still listen?"""
    import asyncio

    import uvloop

    from nextn.server.app import create_app
    from nextn.server.engine_client import EngineClient
    from nextn.server.metrics import Metrics
    from nextn.server.sampling import SamplingDefaults
    from nextn.server.services import Services
    from nextn.server.serving import Supervision, serve
    from nextn.text.tokenizer import Tokenizer

    served_model_name = args.served_model_name or Path(model_path).resolve().name
    tokenizer = None if args.skip_tokenizer_init else Tokenizer(args.tokenizer_path or model_path, args.chat_template)
    url = _url(args.host, listener.getsockname()[1])

    def announce(ready: EngineReady) -> None:
        from nextn.server.page import example_request

        example = example_request(url, served_model_name, tokenizer is not None, args.api_key is not None)
        print(
            f"nextn is ready: {served_model_name} at {url}\n"
            f"  loaded in {ready.load_seconds:.1f} s, context {ready.context_length} tokens,"
            f" KV pool {ready.max_total_tokens} tokens\n"
            f"Try:\n{example}",
            flush=True,
        )

    async def run() -> tuple[str | None, bool]:
        metrics = Metrics()
        client = EngineClient(end, metrics, args.max_running_requests + args.max_queued_requests)
        services = Services(
            args=args,
            model_path=model_path,
            served_model_name=served_model_name,
            engine=client,
            metrics=metrics,
            tokenizer=tokenizer,
            defaults=SamplingDefaults.from_checkpoint(model_path),
            seeds=random.Random(args.random_seed),
        )
        watch = Supervision(
            startup_timeout=args.startup_timeout,
            shutdown_timeout=args.shutdown_timeout,
            watchdog_timeout=args.watchdog_timeout,
            why_engine_ended=engine.why_ended,
            announce=announce,
        )
        reason = await serve(create_app(services), client, listener, watch)
        return reason, reason is None and client.ready is not None

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _url(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _complain(message: str, exit_code: int) -> int:
    print(f"nextn: error: {message}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
