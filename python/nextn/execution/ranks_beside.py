"""Rank 0 in a process of the user's own, and the other ranks beside it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import abandon
from nextn.errors import PeerLost
from nextn.execution.engine import Engine
from nextn.execution.rank_process import joined
from nextn.execution.ranks import RankProcesses, places_of_node

EXIT_TIMEOUT = 5.0
"""Seconds for the other ranks to leave after they were told to."""

LEAVING_LIMIT = 30.0
"""Seconds in which the group ends in good order."""

LAST_MOMENTS = 1.0
"""Seconds between the loss of a rank's connection and the end of its process."""

WATCH_POLL = 0.3
"""Seconds between two looks at the other ranks' processes."""

HELD_UP_LIMIT = 5.0
"""Seconds in which a step that waits for a lost rank fails by itself, unless it waits on a GPU."""

TIMEOUT = 365 * 86400.0
"""Nothing tells the other ranks that this process is well while its user does something else."""


class RanksBeside:
    """Owns the processes of ranks 1 … tp_size - 1, which end with this process at the latest.

    When one of them ends or stands still, the others are ended too, so that no operation waits for them. What waits on
    a GPU waits all the same, and cannot be interrupted: then this process ends.

    The group is left in good order only, else abandoned: to leave it would be to wait for those that are lost.
    """

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
        self._group = contextlib.ExitStack()
        self._closing_since: float | None = None
        self._loss: str | None = None
        self._block: object | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()

    @property
    def pids(self) -> list[int | None]:
        return self._processes.pids

    def start_engine(self, config: EngineConfig) -> Engine:
        """The engine of rank 0, closed at the end of the process at the latest. If it cannot start, all ranks end."""
        try:
            with self.naming_losses(), contextlib.ExitStack() as group:
                engine = Engine(config, group.enter_context(joined(config, self._mine, self._check_alive)))
                self._group = group.pop_all()
                atexit.register(self.close, engine)
                return engine
        except BaseException as error:
            self._loss = f"rank 0 cannot start: {error}"
            self._processes.end(0)
            self._abandon()
            self._resources.close()
            raise

    def _check_alive(self) -> None:
        if (reason := self._processes.why_ended()) is not None:
            raise PeerLost(reason)

    def _watch(self) -> None:
        """Until a rank is lost or all is over."""
        while (reason := self._why_lost()) is None:
            if self._closed.wait(WATCH_POLL):
                return
        self._processes.wait_for_a_cause(LAST_MOMENTS)
        if self._closed.is_set():
            return
        self._loss = reason = self._loss or self._why_lost() or reason
        self._processes.end(0)
        while not self._closed.is_set():
            block = self._block
            if not self._closed.wait(HELD_UP_LIMIT) and block is not None and block is self._block:
                print(f"nextn: error: {reason}, and this process waits for it", file=sys.stderr, flush=True)
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                logging.shutdown()
                os._exit(1)

    def _why_lost(self) -> str | None:
        if self._closing_since is None:
            return self._processes.why_ended()
        if time.monotonic() - self._closing_since > LEAVING_LIMIT:  # as when a step was interrupted
            return f"the ranks did not leave each other within {LEAVING_LIMIT:g} s"
        return self._processes.why_ended(well=False)

    def close(self, engine: Engine) -> None:
        """End the other ranks."""
        if self._closed.is_set():
            return
        atexit.unregister(self.close)
        self._closing_since = time.monotonic()
        try:
            with contextlib.suppress(PeerLost), self.naming_losses():
                engine.close()
                self._group.close()
        finally:
            self._abandon()
            self._processes.end(EXIT_TIMEOUT)
            self._resources.close()

    def _abandon(self) -> None:
        """End the group, if it has not been left, and the watch. An error on the way there says nothing new."""
        with contextlib.suppress(Exception), self.naming_losses():
            self._group.pop_all()
            abandon()
        self._closed.set()

    @contextlib.contextmanager
    def naming_losses(self) -> Iterator[None]:
        """A PeerLost that leaves the block says which rank ended, and how. A block that cannot be left does it too."""
        self._block = object()
        try:
            yield
        except PeerLost as error:
            self._processes.wait_for_a_cause(LAST_MOMENTS)
            raise PeerLost(self._loss or self._processes.why_ended() or str(error)) from error
        finally:
            self._block = None
