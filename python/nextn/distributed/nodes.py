"""What the nodes of a server hear of each other: that each still lives, and why one has ended. Imports no torch.

The first node listens, and every other one holds a connection to it for as long as it lives. A node whose connection
ends, or is silent for long, takes the others with it: a rank that waits on a GPU for a lost one would wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import IO

import msgspec

from nextn.errors import ConfigError, PeerLost

BEAT_INTERVAL = 1.0
"""Seconds between two signs of life."""

SILENCE = 10.0
"""Seconds without one after which a node is lost."""

MEETING_POLL = 0.1
"""Seconds between two tries to reach the first node."""

MAX_LINE_BYTES = 8192
MAX_REASON = 2000

logger = logging.getLogger(__name__)


class _Hello(msgspec.Struct, frozen=True, tag=True):
    """The first line of a node that comes. host: its name"""

    node_rank: int
    nnodes: int
    num_ranks: int
    host: str


class _Welcome(msgspec.Struct, frozen=True, tag=True):
    """What the first node answers. ranks_port: where its first rank listens for the others"""

    host: str
    ranks_port: int


class _Refused(msgspec.Struct, frozen=True, tag=True):
    reason: str


class _Beat(msgspec.Struct, frozen=True, tag=True):
    pass


class _Ended(msgspec.Struct, frozen=True, tag=True):
    """The last line of a node. reason: with its name; None if all is in order"""

    reason: str | None


_Message = _Hello | _Welcome | _Refused | _Beat | _Ended
_DECODER = msgspec.json.Decoder(_Message)


class _Peer:
    """A connection to another node."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE)
        self._connection = connection
        self._lines: IO[bytes] = connection.makefile("rb")

    def send(self, message: _Message) -> None:
        """Raises OSError if the other node is gone."""
        self._connection.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self) -> _Message:
        """Raises OSError if the other node is gone or silent, or if it says what no node says."""
        line = self._lines.readline(MAX_LINE_BYTES)
        if not line:
            raise ConnectionResetError("its connection has ended")
        try:
            return _DECODER.decode(line)
        except msgspec.MsgspecError as error:
            raise OSError(f"it says what no node says: {error}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # also ends a ``receive``
        self._connection.close()


class Nodes:
    """Owns a node's connections to others, each with a thread that listens. node_rank: this node's"""

    def __init__(self, node_rank: int) -> None:
        self._name = _name(node_rank, socket.gethostname())
        self._peers: dict[str, _Peer] = {}
        self._losses: list[str] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._end_is_near = False
        threading.Thread(target=self._beat, name="nodes-beat", daemon=True).start()

    @property
    def end_is_near(self) -> bool:
        """Whether another node has said that all nodes end now, in good order."""
        return self._end_is_near

    def why_lost(self) -> str | None:
        """The reason, once another node is lost."""
        return self._losses[0] if self._losses else None

    def listen(self, name: str, peer: _Peer) -> None:
        """Hear of a node until it is gone or this one ends. name: the node's"""
        with self._lock:
            self._peers[name] = peer
        loss: str | None = None
        try:
            while not isinstance(message := peer.receive(), _Ended):
                pass
            loss, self._end_is_near = message.reason, message.reason is None
        except TimeoutError:
            loss = f"{name} was silent for {SILENCE:g} s"
        except OSError as error:
            loss = f"{name} is gone: {error.strerror or error}"
        if loss is not None and not self._ended.is_set():
            self._losses.append(loss)

    def close(self, reason: str | None) -> None:
        """Tell the other nodes why this one ends, and leave them. reason: None if all is in order"""
        if reason is not None:
            reason = self.why_lost() or f"{self._name}: {reason}"[:MAX_REASON]
        self._ended.set()
        self._send(_Ended(reason))
        with self._lock:
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_INTERVAL):
            self._send(_Beat())

    def _send(self, message: _Message) -> None:
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # the thread that listens finds it gone
                    peer.send(message)


def admit_nodes(listener: socket.socket, *, nnodes: int, num_ranks: int, ranks_port: int) -> Nodes:
    """Begin to wait for the other nodes, on the first one.

    listener: where they come; ranks_port: where its first rank listens for the other ranks
    """
    nodes = Nodes(0)
    welcome = _Welcome(socket.gethostname(), ranks_port)
    admitted = {0}

    def why_refused(hello: _Hello) -> str | None:
        if (hello.nnodes, hello.num_ranks) != (nnodes, num_ranks):
            return (
                f"found --nnodes {hello.nnodes} --tp-size {hello.num_ranks}, expected --nnodes {nnodes} --tp-size "
                f"{num_ranks} as on node 0; start all nodes with the same arguments, except --node-rank"
            )
        if hello.node_rank in admitted:
            return f"--node-rank: another node {hello.node_rank} is there; give each node its own"
        admitted.add(hello.node_rank)
        return None

    def meet(peer: _Peer) -> None:
        with contextlib.suppress(OSError):  # whoever does not begin as a node is none
            if isinstance(hello := peer.receive(), _Hello):
                with meeting:
                    refusal = why_refused(hello)
                peer.send(welcome if refusal is None else _Refused(refusal))
                if refusal is None:
                    nodes.listen(_name(hello.node_rank, hello.host), peer)
        peer.close()

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                threading.Thread(target=meet, args=(_Peer(listener.accept()[0]),), daemon=True).start()

    meeting = threading.Lock()
    threading.Thread(target=accept, name="nodes-accept", daemon=True).start()
    return nodes


def reach_first_node(address: str, *, node_rank: int, nnodes: int, num_ranks: int, timeout: float) -> tuple[Nodes, int]:
    """Come to the first node, on every other one. Returns also the port of its first rank.

    address: HOST:PORT; timeout: seconds to wait for it
    Raises PeerLost if it does not answer, ConfigError if it was started with other arguments.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    logger.info("node %d looks for node 0 at %s", node_rank, address)
    while True:
        try:
            peer = _Peer(socket.create_connection((host.strip("[]"), int(port)), SILENCE))
            peer.send(_Hello(node_rank, nnodes, num_ranks, socket.gethostname()))
            answer = peer.receive()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(f"node 0 did not answer at {address} within {timeout:g} s: {error}") from error
            time.sleep(MEETING_POLL)
    if isinstance(answer, _Refused):
        raise ConfigError(f"node {node_rank}: {answer.reason}")
    assert isinstance(answer, _Welcome), "node 0 welcomes or refuses"
    nodes = Nodes(node_rank)
    threading.Thread(target=nodes.listen, args=(_name(0, answer.host), peer), name="nodes-listen", daemon=True).start()
    return nodes, answer.ranks_port


def listen_everywhere(port: int) -> socket.socket:
    """A TCP socket that listens on all of this machine's addresses. port: 0 is any. Raises OSError if it is taken."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _name(node_rank: int, host: str) -> str:
    return f"node {node_rank} ({host})"
