"""Where one rank of a tensor-parallel group stands, and where it meets the others."""

from __future__ import annotations

import socket
from dataclasses import dataclass

PEER_LOST_EXIT_CODE = 75
"""Of a rank that ends because another one is gone: the other's end is the reason to report."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """rendezvous: "file://PATH" on one machine, "tcp://HOST:PORT" of the first over several; None for one rank

    ranks_per_node: the ranks that share this machine
    timeout: seconds that a rank waits for another before it gives up
    listener: of the first rank, the socket behind "tcp://HOST:PORT"; None lets it listen there itself
    """

    rank: int = 0
    size: int = 1
    ranks_per_node: int = 1
    rendezvous: str | None = None
    timeout: float = 1800.0
    listener: socket.socket | None = None
