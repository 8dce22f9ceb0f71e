"""A rank as a process: it meets the others, and every one but the first loads its part and follows."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from nextn.config.engine_config import EngineConfig
from nextn.config.ranks import PEER_LOST_EXIT_CODE, RankPlace
from nextn.distributed.parallel import TensorParallel, join, leave
from nextn.errors import ConfigError, NextnError, PeerLost
from nextn.execution.device import choose_device
from nextn.execution.shard import load_shard
from nextn.execution.threads import set_num_threads
from nextn.protocol.channel import send_last_words
from nextn.protocol.messages import EngineFailed

PARENT_POLL = 0.3
"""Seconds between two looks whether the parent process still lives."""

DEVICE_POLL = 1.0
"""Seconds between two looks whether the GPU of a rank that follows still works."""

OF_EACH_NODE = ("model_path", "draft_model_path", "tokenizer_path")
"""Settings that may differ between machines."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def joined(
    config: EngineConfig, place: RankPlace, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[TensorParallel]:
    """The group that this process is a rank of, until the block ends.

    while_waiting: called now and then until all are here; may raise
    Raises PeerLost if the others do not come, ConfigError if they were started with other arguments.
    """
    tp = TensorParallel(place.rank, place.size, place.ranks_per_node)
    join(
        tp,
        rendezvous=place.rendezvous,
        device=choose_device(config.device, tp.local_rank),
        timeout=place.timeout,
        while_waiting=while_waiting,
        listener=place.listener,
    )
    _check_agreement(config, tp)
    yield tp
    leave(tp)  # not after a failure: it would wait for the others


def _check_agreement(config: EngineConfig, tp: TensorParallel) -> None:
    if tp.size == 1:
        return
    mine = {name: value for name, value in asdict(config).items() if name not in OF_EACH_NODE}
    if tp.is_first:
        tp.send(msgspec.msgpack.encode(mine))
        return
    for name, expected in msgspec.msgpack.decode(tp.receive()).items():
        if mine[name] != expected:
            raise ConfigError(
                f"rank {tp.rank}: {name}: found {mine[name]!r}, expected {expected!r} as on the first node; start all "
                "nodes with the same arguments, except --node-rank"
            )


def configure_logging(name: str, level: str) -> None:
    """Send the process's log to stderr, under its name; libraries only from warnings up."""
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s %(levelname)s {name}: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )
    logging.getLogger("nextn").setLevel(level.upper())


def run_follower(
    config: EngineConfig,
    place: RankPlace,
    socket_dir: str | None,
    parent_pid: int,
    num_threads: int | None,
    log_level: str,
) -> None:
    """Entry point of every rank's process but the first: load, and follow until rank 0 says that it is over.

    socket_dir: where the server hears of a failure; None on nodes that have no server
    """
    configure_logging(f"rank {place.rank}", log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent_pid)

    def fail(error: Exception) -> NoReturn:
        logger.error("rank %d failed", place.rank, exc_info=error)
        _end_as_failed(EngineFailed(f"rank {place.rank}: {type(error).__name__}: {error}"), socket_dir)

    try:
        set_num_threads(config.model_path, num_threads, place.ranks_per_node)
        with joined(config, place) as tp:
            shard = load_shard(config, tp)
            logger.info("ready: KV pool of %d pages", shard.num_pages)
            with ending_with_device(shard.kv_cache.k.device, fail):
                shard.follow(tp)
    except PeerLost as error:
        end_as_lost(error)
    except NextnError as error:
        logger.error("%s", error)
        _end_as_failed(EngineFailed(str(error), user_error=True), socket_dir)
    except Exception as error:
        fail(error)


@contextlib.contextmanager
def ending_with_device(device: torch.device, fail: Callable[[Exception], None]) -> Iterator[None]:
    """Within the block, ``fail`` from a thread when the GPU does. The block waits for rank 0, which waits for it."""
    if device.type == "cpu":
        yield
        return
    has_left = threading.Event()

    def watch() -> None:
        stream = torch.cuda.current_stream(device)
        try:
            while not has_left.wait(DEVICE_POLL):
                stream.query()
        except RuntimeError as error:
            if not has_left.is_set():
                fail(error)

    threading.Thread(target=watch, name="device-watch", daemon=True).start()
    try:
        yield
    finally:
        has_left.set()


def _end_as_failed(failure: EngineFailed, socket_dir: str | None) -> NoReturn:
    if socket_dir is not None:
        send_last_words(Path(socket_dir), failure)
    logging.shutdown()
    os._exit(1)


def end_as_lost(error: PeerLost) -> NoReturn:
    """End this process at once, without a reason of its own: whoever watches all ranks knows who was the first."""
    logger.error("%s", error)
    logging.shutdown()
    os._exit(PEER_LOST_EXIT_CODE)


def end_with_parent(parent_pid: int) -> None:
    """End this process when its parent ends, also while it waits for another rank."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
