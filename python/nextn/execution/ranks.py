"""The processes of a node's ranks: started together, watched, and ended together. Imports no torch.

A rank can wait on a GPU for one that is lost, and then neither sees the time pass nor can be asked to leave. So nothing
in a rank's own process decides that another is lost: whoever watches the processes does, and kills those that are left.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path

from nextn.config.cuts import check_cut
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.config.ranks import PEER_LOST_EXIT_CODE, RankPlace

STOPPED_LIMIT = 5.0
"""Seconds that one of several ranks may be stopped, by SIGSTOP for instance, before all of them end."""

EngineEntry = Callable[[EngineConfig, str, int, int | None, str], None]


class RankProcesses:
    """Owns one process per place.

    socket_dir: where rank 0 meets the server; None where there is none
    engine_entry: what the process of a rank that is alone runs; None is the real engine
    why_others_ended: the reason once the ranks of another node are lost, else None
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
        why_others_ended: Callable[[], str | None] = lambda: None,
    ) -> None:
        if places[0].size > 1:
            check_cut(ModelConfig.from_pretrained(Path(config.model_path)), places[0].size)
        self.places = tuple(places)
        self._why_others_ended = why_others_ended
        self._stopped_since: dict[int, float] = {}
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
        """The reason, if a process has ended or stands still, or another node is lost.

        well: whether an end with exit code 0 counts
        """
        if (cause := self._cause(well=well)) is not None:
            return cause
        lost = next((one for one in self._ended() if one[1].exitcode == PEER_LOST_EXIT_CODE), None)
        if lost is None:
            return None
        has_other_nodes = lost[0].ranks_per_node < lost[0].size
        return f"{_name(*lost)} lost " + (
            "the ranks of another node; see the log there" if has_other_nodes else "another rank; see the log"
        )

    def wait_for_a_cause(self, timeout: float) -> None:
        """Until it is known what took the others with it, ``timeout`` seconds at most.

        A process closes its connections a moment before it has an exit code.
        """
        deadline = time.monotonic() + timeout
        while self._cause(well=True) is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _ended(self) -> list[tuple[RankPlace, SpawnProcess]]:
        return [one for one in zip(self.places, self._processes, strict=True) if one[1].exitcode is not None]

    def _cause(self, *, well: bool) -> str | None:
        """Why a process has ended that did not lose another, or what the processes lost or wait for.

        NCCL aborts a process that loses another, so an abort is the cause only where there is no better one.
        """
        ended = [
            (place, process)
            for place, process in self._ended()
            if process.exitcode != PEER_LOST_EXIT_CODE and (well or process.exitcode != 0)
        ]
        ended.sort(key=lambda one: one[1].exitcode == -signal.SIGABRT)
        if not ended:
            return self._why_others_ended() or self._why_stopped()
        place, process = ended[0]
        reason = f"{_name(place, process)} {describe_exit(process.exitcode or 0)}"
        return self._why_others_ended() or reason if process.exitcode == -signal.SIGABRT else reason

    def _why_stopped(self) -> str | None:
        """A process that is stopped keeps its connections, so that the others would wait for it."""
        if self.places[0].size == 1:
            return None
        now = time.monotonic()
        for place, process in zip(self.places, self._processes, strict=True):
            if (number := _stopped_by(process)) is None:
                self._stopped_since.pop(place.rank, None)
            elif now - self._stopped_since.setdefault(place.rank, now) > STOPPED_LIMIT:
                by = signal.Signals(number).name
                return f"{_name(place, process)} was stopped by {by} for more than {STOPPED_LIMIT:g} s"
        return None

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


def _name(place: RankPlace, process: SpawnProcess) -> str:
    return "the engine process" if place.size == 1 else f"rank {place.rank} of {place.size} (pid {process.pid})"


def _stopped_by(process: SpawnProcess) -> int | None:
    """The signal that has stopped a process, if it is stopped. The process stays as it is for whoever waits for it."""
    assert process.pid is not None, "it was started"
    if not hasattr(os, "waitid"):  # older Python on macOS
        return None
    try:
        state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if state is None else state.si_status


def places_of_node(
    tp_size: int,
    *,
    nnodes: int,
    node_rank: int,
    rendezvous: str,
    timeout: float,
    listener: socket.socket | None = None,
) -> list[RankPlace]:
    """The places of the ranks that a node runs. nnodes divides tp_size; listener: of the first rank, if it has one"""
    per_node = tp_size // nnodes
    return [
        RankPlace(
            rank=rank,
            size=tp_size,
            ranks_per_node=per_node,
            rendezvous=rendezvous if tp_size > 1 else None,
            timeout=timeout,
            listener=listener if rank == 0 else None,
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
    """A rank's process. Signals that reach the whole process group are the server's business, or another node's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if socket_dir is not None or place.ranks_per_node < place.size:
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
