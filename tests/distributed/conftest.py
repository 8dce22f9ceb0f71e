"""Engines over several ranks on this machine: rank 0 in the test's process, the others in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.config.engine_config import EngineConfig
from nextn.execution.engine import Engine
from nextn.execution.rank_process import end_with_parent, joined
from nextn.execution.ranks import places_of_node
from nextn.execution.shard import load_shard

MAX_RANKS = 4
EngineContext = Callable[..., AbstractContextManager[Engine]]


def follow_again_and_again(jobs: Connection, parent_pid: int) -> None:
    """A process that is a follower of one engine after another, which saves the start of Python and torch."""
    torch.set_num_threads(1)
    end_with_parent(parent_pid)
    while True:
        try:
            config, place = jobs.recv()
        except EOFError:
            return
        try:
            with joined(config, place) as tp:
                shard = load_shard(config, tp)
                shard.follow(tp)
        except Exception as error:
            jobs.send(f"{type(error).__name__}: {error}")
            os._exit(1)
        jobs.send(None)


@pytest.fixture(scope="session")
def followers() -> Iterator[list[Connection]]:
    """Connections to processes of ranks 1, 2, …, started when a test first asks for them."""
    made: list[Connection] = []
    yield made
    for connection in made:
        connection.close()


@pytest.fixture(scope="session")
def engine_over(followers: list[Connection], tmp_path_factory: pytest.TempPathFactory) -> EngineContext:
    """``engine_over(num_ranks, **fields of EngineConfig)``, a context: the engine, which ends with the block."""

    @contextlib.contextmanager
    def over(num_ranks: int, **options: Any) -> Iterator[Engine]:
        config = EngineConfig(**options)
        if num_ranks == 1:
            yield Engine(config)
            return
        start_followers(followers, num_ranks - 1)
        rendezvous = f"file://{tmp_path_factory.mktemp('group')}/rendezvous"
        mine, *others = places_of_node(num_ranks, nnodes=1, node_rank=0, rendezvous=rendezvous, timeout=60)
        for place in others:
            followers[place.rank - 1].send((config, place))
        with joined(config, mine) as tp:
            engine = Engine(config, tp)
            yield engine
            engine.close()
        assert [followers[place.rank - 1].recv() for place in others] == [None] * len(others)

    return over


def start_followers(followers: list[Connection], num: int) -> None:
    context = multiprocessing.get_context("spawn")
    while len(followers) < num:
        mine, theirs = context.Pipe()
        context.Process(target=follow_again_and_again, args=(theirs, os.getpid()), daemon=True).start()
        followers.append(mine)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For a checkpoint."""
    return tmp_path / "checkpoint"
