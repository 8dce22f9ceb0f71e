"""Rank 0 in a process of the user's own, and the other ranks beside it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from nextn.config.engine_config import EngineConfig
from nextn.errors import PeerLost
from nextn.execution.engine import Engine
from nextn.execution.rank_process import joined
from nextn.execution.ranks import RankProcesses, places_of_node

EXIT_TIMEOUT = 5.0
"""Seconds for the other ranks to leave after they were told to."""

LAST_MOMENTS = 1.0
"""Seconds between the loss of a rank's connection and the end of its process."""

TIMEOUT = 365 * 86400.0
"""Nothing tells the other ranks that this process is well while its user does something else."""


class RanksBeside:
    """Owns the processes of ranks 1 … tp_size - 1, which end with this process at the latest."""

    def __init__(self, config: EngineConfig, tp_size: int, num_threads: int | None, log_level: str) -> None:
        with contextlib.ExitStack() as resources:
            directory = resources.enter_context(
                tempfile.TemporaryDirectory(prefix="nextn-", ignore_cleanup_errors=True)
            )
            rendezvous = f"file://{directory}/rendezvous"
            self._mine, *others = places_of_node(tp_size, nnodes=1, node_rank=0, rendezvous=rendezvous, timeout=TIMEOUT)
            self._processes = RankProcesses(
                others, config, socket_dir=None, num_threads=num_threads, log_level=log_level
            )
            self._resources = resources.pop_all()

    @property
    def pids(self) -> list[int | None]:
        return self._processes.pids

    def start_engine(self, config: EngineConfig) -> Engine:
        """The engine of rank 0. If it cannot start, the other ranks end."""
        try:
            with self.naming_losses():
                tp = self._resources.enter_context(joined(config, self._mine, self._check_alive))
                return Engine(config, tp)
        except BaseException:
            self._processes.end(0)
            self._resources.close()
            raise

    def _check_alive(self) -> None:
        if (reason := self._processes.why_ended()) is not None:
            raise PeerLost(reason)

    def close(self, engine: Engine) -> None:
        """End the other ranks."""
        with contextlib.suppress(PeerLost):
            engine.close()
        self._resources.close()
        self._processes.end(EXIT_TIMEOUT)

    @contextlib.contextmanager
    def naming_losses(self) -> Iterator[None]:
        """A PeerLost that leaves the block says which rank ended, and how."""
        try:
            yield
        except PeerLost as error:
            self._processes.wait_for_an_end(LAST_MOMENTS)
            raise PeerLost(self._processes.why_ended() or str(error)) from error
