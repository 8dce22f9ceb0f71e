"""Nodes that find each other, and what each hears of the others."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from nextn.distributed import nodes as module
from nextn.distributed.nodes import Nodes, admit_nodes, listen_everywhere, reach_first_node
from nextn.errors import ConfigError, PeerLost

from tests.server.conftest import wait_until

HOST = socket.gethostname()
RANKS_PORT = 1234


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where the first node waits for the others."""
    with listen_everywhere(0) as found:
        yield found
        with contextlib.suppress(OSError):
            found.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def first(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Of three nodes with two ranks each; signs of life are ten times as frequent as usual."""
    monkeypatch.setattr(module, "BEAT_INTERVAL", 0.1)
    monkeypatch.setattr(module, "SILENCE", 1.0)
    nodes = admit_nodes(listener, nnodes=3, num_ranks=6, ranks_port=RANKS_PORT)
    yield nodes
    nodes.close(None)


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def reach(listener: socket.socket, node_rank: int, nnodes: int = 3, timeout: float = 10) -> Nodes:
    nodes, port = reach_first_node(
        address(listener), node_rank=node_rank, nnodes=nnodes, num_ranks=2 * nnodes, timeout=timeout
    )
    assert port == RANKS_PORT
    return nodes


def losses(*nodes: Nodes) -> list[str | None]:
    """Once all know of one."""
    wait_until(lambda: all(one.why_lost() is not None for one in nodes), 5)
    return [one.why_lost() for one in nodes]


def test_nodes_that_live_are_not_lost_however_long_nothing_happens(first: Nodes, listener: socket.socket) -> None:
    others = [reach(listener, node_rank) for node_rank in (2, 1)]
    time.sleep(1.5)  # longer than a silent node would be waited for
    assert [one.why_lost() for one in (first, *others)] == [None] * 3
    first.close(None)
    wait_until(lambda: all(one.end_is_near for one in others))
    for one in others:
        one.close(None)
    assert [one.why_lost() for one in (first, *others)] == [None] * 3


def test_all_nodes_hear_why_one_ends(first: Nodes, listener: socket.socket) -> None:
    second, third = (reach(listener, node_rank) for node_rank in (1, 2))
    second.close("rank 3 of 6 (pid 7) was killed by SIGKILL")
    reason = f"node 1 ({HOST}): rank 3 of 6 (pid 7) was killed by SIGKILL"
    assert losses(first) == [reason]
    first.close("what the server makes of it")
    assert losses(third) == [reason]
    assert not third.end_is_near
    third.close("and so on")


def test_a_node_that_is_gone_or_silent_is_lost(first: Nodes, listener: socket.socket) -> None:
    hello = b'{"type":"_Hello","node_rank":%d,"nnodes":3,"num_ranks":6,"host":"far"}\n'
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as gone:
        gone.sendall(hello % 1)
        assert b"_Welcome" in gone.recv(4096)
    assert losses(first) == ["node 1 (far) is gone: its connection has ended"]
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as silent:
        silent.sendall(hello % 2)
        wait_until(lambda: len(first._losses) == 2, 5)
    assert first._losses[1] == "node 2 (far) was silent for 1 s"


def test_whoever_is_no_node_harms_nobody(first: Nodes, listener: socket.socket) -> None:
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b'{"type":"_Ended","reason":"mine"}\n'):
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as stranger:
            stranger.sendall(said)
    second = reach(listener, 1)
    time.sleep(0.3)
    assert (first.why_lost(), second.why_lost()) == (None, None)
    second.close(None)


def test_a_node_that_was_started_with_other_arguments_is_refused(first: Nodes, listener: socket.socket) -> None:
    with pytest.raises(ConfigError, match="node 1: found --nnodes 2 --tp-size 4, expected --nnodes 3 --tp-size 6"):
        reach(listener, 1, nnodes=2)
    second = reach(listener, 1)
    with pytest.raises(ConfigError, match="--node-rank: another node 1 is there; give each node its own"):
        reach(listener, 1)
    assert first.why_lost() is None
    second.close(None)


def test_a_first_node_that_does_not_come_is_not_waited_for_longer_than_the_timeout() -> None:
    with listen_everywhere(0) as listener:
        where = address(listener)
    with pytest.raises(PeerLost, match=rf"node 0 did not answer at {where} within 0\.2 s: .*refused"):
        reach_first_node(where, node_rank=1, nnodes=2, num_ranks=2, timeout=0.2)
