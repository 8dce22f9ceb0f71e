"""``python -m nextn.launch_server``: from arguments to a running server, and back to an exit code.

With several ranks, each is a process beside the server; a node that is not the first runs its ranks alone.
Exit codes: 0 after SIGINT or SIGTERM, 1 when the server cannot start or its engine fails, 2 for wrong arguments.
Heavy imports are inside functions: the engine process imports this module too, and needs none of them.
"""

from __future__ import annotations

import logging
import math
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
from typing import TYPE_CHECKING, NoReturn

from nextn.distributed.nodes import Nodes, admit_nodes, listen_everywhere, reach_first_node
from nextn.errors import ConfigError, NextnError
from nextn.execution.ranks import EngineEntry, RankProcesses, places_of_node

if TYPE_CHECKING:
    from nextn.config.engine_config import EngineConfig
    from nextn.config.server_args import ServerArgs
    from nextn.protocol.channel import ServerEnd
    from nextn.protocol.messages import EngineReady

logger = logging.getLogger("nextn.launch_server")

ENGINE_EXIT_TIMEOUT = 5.0
"""Seconds for the engine's processes to leave after they were told to, before they are killed."""

NODE_POLL_INTERVAL = 0.1

CAUSE_TIMEOUT = 5.0
"""Seconds after the end of another node in which it says why, or that all is in order."""


class Stopped(Exception):
    """SIGTERM or SIGINT came before the server could drain in an orderly way."""


def main(argv: Sequence[str] | None = None, engine_entry: EngineEntry | None = None) -> int:
    """Run the server until a signal or a failure; returns the exit code.

    engine_entry: the function that the engine process runs; None is the real engine
    """
    from nextn.config.server_args import ServerArgs
    from nextn.server.listening import listen, make_room_for_connections
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
        make_room_for_connections(args.max_requests_in_flight)
        with listen(args.host, args.port) as listener:
            return _run(args, listener, engine_entry)
    except NextnError as error:
        return _complain(str(error), 1)
    except Stopped:
        return 0


def _run(args: ServerArgs, listener: socket.socket, engine_entry: EngineEntry | None) -> int:
    """Start the engine's processes, serve around them, and leave neither them nor their socket directory behind."""
    from nextn.checkpoint.hub import resolved_config
    from nextn.protocol.channel import ServerEnd, private_socket_dir

    config = resolved_config(args)
    socket_dir = private_socket_dir()
    end = ServerEnd(socket_dir)  # bound before the engine starts, so that even its last words arrive
    engine: RankProcesses | None = None
    nodes: Nodes | None = None
    reason: str | None = "it was stopped"
    grace = 0.0
    try:
        if args.nnodes == 1:
            rendezvous = f"tcp://{args.dist_init_addr}" if args.dist_init_addr else f"file://{socket_dir}/rendezvous"
            engine = _spawn(args, config, rendezvous, socket_dir=socket_dir, engine_entry=engine_entry)
        else:
            nodes, of_ranks = _admit_nodes(args)
            with of_ranks:  # from here on the first rank's own
                rendezvous = _rendezvous(args, of_ranks.getsockname()[1])
                engine = _spawn(
                    args, config, rendezvous, socket_dir=socket_dir, nodes=nodes, listener_of_ranks=of_ranks
                )
        reason, is_engine_well = _serve(args, config.model_path, end, listener, engine)
        grace = ENGINE_EXIT_TIMEOUT if is_engine_well else 0.0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if nodes is not None:
            nodes.close(reason)
        if engine is not None and not engine.end(grace) and grace:
            logger.warning("the engine did not leave within %g s and was killed", grace)
        end.close()
        shutil.rmtree(socket_dir, ignore_errors=True)
    return 0 if reason is None else _complain(reason, 1)


def _follow(args: ServerArgs) -> int:
    """Run the ranks of a node that is not the first, until they end or one of them, or another node, fails."""
    from nextn.checkpoint.hub import resolved_config

    config = resolved_config(args)
    nodes, ranks_port = reach_first_node(
        args.dist_init_addr or "",
        node_rank=args.node_rank,
        nnodes=args.nnodes,
        num_ranks=args.tp_size,
        timeout=_timeout(args),
    )
    ranks: RankProcesses | None = None
    reason: str | None = "it was stopped"
    grace = 0.0
    try:
        ranks = _spawn(args, config, _rendezvous(args, ranks_port), nodes=nodes)
        try:
            reason = _watch(ranks, nodes)
        except Stopped:  # node 0 may have been asked too, and finishes its responses first
            logger.info("node %d was asked to stop, and waits for node 0; asked again it ends at once", args.node_rank)
            reason = _watch(ranks, nodes, args.shutdown_timeout + CAUSE_TIMEOUT)
        grace = 0.0 if reason else ENGINE_EXIT_TIMEOUT
        return 0 if reason is None else _complain(reason, 1)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        nodes.close(reason)
        if ranks is not None:
            ranks.end(grace)


def _watch(ranks: RankProcesses, nodes: Nodes, timeout: float = math.inf) -> str | None:
    """Until all ends in good order (None) or something fails (the reason). timeout: seconds; then raises Stopped"""
    deadline = time.monotonic() + timeout
    while not ranks.have_ended_well and not nodes.end_is_near:
        time.sleep(NODE_POLL_INTERVAL)
        if ranks.why_ended(well=False) is not None:
            ranks.wait_for_a_cause(CAUSE_TIMEOUT)
            return ranks.why_ended(well=False) or "a rank ended"
        if time.monotonic() > deadline:
            raise Stopped
    return None


def _admit_nodes(args: ServerArgs) -> tuple[Nodes, socket.socket]:
    """Wait for the other nodes from now on. Returns also a socket where the first rank will meet the other ranks."""
    port = int((args.dist_init_addr or "").rpartition(":")[2])
    try:
        listener, of_ranks = listen_everywhere(port), listen_everywhere(0)
    except OSError as error:
        raise ConfigError(
            f"--dist-init-addr {args.dist_init_addr}: the nodes cannot meet there: {error.strerror}; give a free port "
            "of node 0"
        ) from error
    ranks_port = of_ranks.getsockname()[1]
    return admit_nodes(listener, nnodes=args.nnodes, num_ranks=args.tp_size, ranks_port=ranks_port), of_ranks


def _rendezvous(args: ServerArgs, ranks_port: int) -> str:
    """Where the ranks of several nodes meet: the first node, at another port than the nodes themselves."""
    return f"tcp://{(args.dist_init_addr or '').rpartition(':')[0]}:{ranks_port}"


def _timeout(args: ServerArgs) -> float:
    """Seconds that a rank or a node waits for another."""
    return max(args.startup_timeout, args.watchdog_timeout)


def _spawn(
    args: ServerArgs,
    config: EngineConfig,
    rendezvous: str,
    *,
    socket_dir: Path | None = None,
    nodes: Nodes | None = None,
    listener_of_ranks: socket.socket | None = None,
    engine_entry: EngineEntry | None = None,
) -> RankProcesses:
    """The processes of this node's ranks. socket_dir: where rank 0 meets the server; None on other nodes"""
    places = places_of_node(
        args.tp_size,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        rendezvous=rendezvous,
        timeout=_timeout(args),
        listener=listener_of_ranks,
    )
    processes = RankProcesses(
        places,
        config,
        socket_dir=None if socket_dir is None else str(socket_dir),
        num_threads=args.num_threads,
        log_level=args.log_level,
        engine_entry=engine_entry,
        why_others_ended=(lambda: None) if nodes is None else nodes.why_lost,
    )
    for place, pid in zip(places, processes.pids, strict=True):
        logger.info("engine process started rank=%d pid=%d model=%s", place.rank, pid, config.model_path)
    return processes


def _serve(
    args: ServerArgs, model_path: str, end: ServerEnd, listener: socket.socket, engine: RankProcesses
) -> tuple[str | None, bool]:
    """Serve until asked to stop (None) or until the engine fails (the reason); also: does the engine still listen?"""
    import asyncio

    import uvloop

    from nextn.checkpoint.hub import model_name
    from nextn.server.app import create_app
    from nextn.server.engine_client import EngineClient
    from nextn.server.metrics import Metrics
    from nextn.server.sampling import SamplingDefaults
    from nextn.server.services import Services
    from nextn.server.serving import Supervision, serve
    from nextn.text.grammar_compiler import GrammarProver
    from nextn.text.tokenizer import Tokenizer

    served_model_name = args.served_model_name or model_name(args, model_path)
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
        client = EngineClient(end, metrics, args.max_requests_in_flight)
        services = Services(
            args=args,
            model_path=model_path,
            served_model_name=served_model_name,
            engine=client,
            metrics=metrics,
            tokenizer=tokenizer,
            prover=GrammarProver(args.tokenizer_path or model_path),
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


def leave(exit_code: int) -> NoReturn:
    """End the process now; threads that still tokenize or wait for a grammar's proof are not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
