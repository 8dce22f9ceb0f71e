"""The processes of a node's ranks: started together, watched, and ended together. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path

from nextn.config.cuts import check_cut
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.config.ranks import PEER_LOST_EXIT_CODE, RankPlace

EngineEntry = Callable[[EngineConfig, str, int, int | None, str], None]


class RankProcesses:
    """Owns one process per place.

    socket_dir: where rank 0 meets the server; None where there is none
    engine_entry: what the process of a rank that is alone runs; None is the real engine
    Raises ConfigError, before a process starts, if the model's heads cannot be cut over the ranks.
    """

    def __init__(
        self,
        places: Sequence[RankPlace],
        config: EngineConfig,
        *,
        socket_dir: str | None,
        num_threads: int | None,
        log_level: str,
        engine_entry: EngineEntry | None = None,
    ) -> None:
        if places[0].size > 1:
            check_cut(ModelConfig.from_pretrained(Path(config.model_path)), places[0].size)
        self.places = tuple(places)
        self._processes: list[SpawnProcess] = []
        try:
            for place in self.places:
                process = multiprocessing.get_context("spawn").Process(
                    target=_rank_main,
                    args=(engine_entry, place, config, socket_dir, os.getpid(), num_threads, log_level),
                    name=f"nextn-rank-{place.rank}",
                    daemon=True,
                )
                process.start()
                self._processes.append(process)
        except BaseException:
            self.end(0)
            raise

    @property
    def pids(self) -> list[int | None]:
        return [process.pid for process in self._processes]

    @property
    def have_ended_well(self) -> bool:
        return all(process.exitcode == 0 for process in self._processes)

    def why_ended(self, *, well: bool = True) -> str | None:
        """The reason, if a process has ended; that of the one which took the others with it.

        well: whether an end with exit code 0 counts
        """
        ended = [
            (place, process)
            for place, process in zip(self.places, self._processes, strict=True)
            if process.exitcode is not None and (well or process.exitcode != 0)
        ]
        if not ended:
            return None
        place, process = next((one for one in ended if one[1].exitcode != PEER_LOST_EXIT_CODE), ended[0])
        name = "the engine process" if place.size == 1 else f"rank {place.rank} of {place.size} (pid {process.pid})"
        if process.exitcode == PEER_LOST_EXIT_CODE:
            return f"{name} lost the ranks of another node; see the log there"
        return f"{name} {describe_exit(process.exitcode or 0)}"

    def wait_for_an_end(self, timeout: float) -> None:
        """Until a process has an exit code, ``timeout`` seconds at most. Its files are closed a moment before that."""
        deadline = time.monotonic() + timeout
        while self.why_ended() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def end(self, timeout: float) -> bool:
        """Give the processes ``timeout`` seconds to leave, then kill them. Returns whether they left."""
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
        left = all(process.exitcode is not None for process in self._processes)
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
        for process in self._processes:
            process.join()
        return left


def places_of_node(tp_size: int, *, nnodes: int, node_rank: int, rendezvous: str, timeout: float) -> list[RankPlace]:
    """The places of the ranks that a node runs. nnodes divides tp_size."""
    per_node = tp_size // nnodes
    return [
        RankPlace(
            rank=rank,
            size=tp_size,
            ranks_per_node=per_node,
            rendezvous=rendezvous if tp_size > 1 else None,
            timeout=timeout,
        )
        for rank in range(node_rank * per_node, (node_rank + 1) * per_node)
    ]


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _rank_main(
    entry: EngineEntry | None,
    place: RankPlace,
    config: EngineConfig,
    socket_dir: str | None,
    parent_pid: int,
    num_threads: int | None,
    log_level: str,
) -> None:
    """A rank's process. Signals that reach the whole process group are the server's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if socket_dir is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if place.rank > 0:
        from nextn.execution.rank_process import run_follower

        run_follower(config, place, socket_dir, parent_pid, num_threads, log_level)
        return
    assert socket_dir is not None, "rank 0 serves a socket"
    if entry is not None:
        entry(config, socket_dir, parent_pid, num_threads, log_level)
        return
    from nextn.execution.engine_process import run_engine

    run_engine(config, socket_dir, parent_pid, num_threads, log_level, place)
