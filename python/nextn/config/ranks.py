"""Where one rank of a tensor-parallel group stands, and where it meets the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """rendezvous: "file://PATH" on one node, "tcp://HOST:PORT" of the first node over several; None for one rank

    ranks_per_node: the ranks that share this machine
    timeout: seconds that a rank waits for another before it gives up
    """

    rank: int = 0
    size: int = 1
    ranks_per_node: int = 1
    rendezvous: str | None = None
    timeout: float = 1800.0
