"""A group's operations alone, and what ranks agree on before they load."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from nextn.config.engine_config import EngineConfig
from nextn.distributed import parallel
from nextn.distributed.parallel import SINGLE, TensorParallel, join, leave
from nextn.errors import ConfigError, PeerLost
from nextn.execution.rank_process import _check_agreement
from nextn.execution.ranks import places_of_node


@dataclass(frozen=True)
class Told(TensorParallel):
    """A rank that receives ``message``."""

    message: bytes = b""

    def receive(self) -> bytes:
        return self.message


def test_alone_every_operation_gives_back_what_it_got() -> None:
    x = torch.randn(3, 4)
    for operation in (SINGLE.all_reduce, SINGLE.all_gather, SINGLE.broadcast):
        assert operation(x) is x
    assert SINGLE.gather_columns(x, 4) is x
    assert SINGLE.least(7) == 7
    join(SINGLE, rendezvous=None, device=torch.device("cpu"), timeout=1)
    leave(SINGLE)


def test_ranks_that_do_not_come_are_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match=r"not all of 2 ranks came to file://.* within 0\.2 s"):
        join(TensorParallel(0, 2), rendezvous=f"file://{tmp_path}/r", device=torch.device("cpu"), timeout=0.2)


def test_an_address_that_is_taken_is_said_to_be_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ConfigError, match=f"{address}: the ranks cannot meet there: .*; give a free port of node 0"
        ):
            join(TensorParallel(0, 2), rendezvous=address, device=torch.device("cpu"), timeout=1)


def test_nodes_with_other_arguments_are_refused_and_may_differ_in_their_paths() -> None:
    told = {"page_size": 16, "random_seed": 0}
    tp = Told(1, 2, message=msgspec.msgpack.encode(told))
    _check_agreement(EngineConfig(model_path="here"), tp)
    message = "rank 1: page_size: found 8, expected 16 as on the first node; start all nodes with the same arguments"
    with pytest.raises(ConfigError, match=message):
        _check_agreement(EngineConfig(model_path="here", page_size=8), tp)


def test_ranks_are_spread_over_nodes_in_order() -> None:
    places = [
        place
        for node in range(2)
        for place in places_of_node(8, nnodes=2, node_rank=node, rendezvous="tcp://first:7", timeout=5)
    ]
    assert [place.rank for place in places] == list(range(8))
    assert {(place.size, place.ranks_per_node, place.rendezvous) for place in places} == {(8, 4, "tcp://first:7")}
    assert [TensorParallel(p.rank, p.size, p.ranks_per_node).local_rank for p in places] == [*range(4), *range(4)]
    (alone,) = places_of_node(1, nnodes=1, node_rank=0, rendezvous="file:///x", timeout=5)
    assert alone.rendezvous is None


def test_a_fault_of_this_ranks_own_device_is_no_loss_of_another() -> None:
    for own in (torch.OutOfMemoryError, torch.AcceleratorError):
        with pytest.raises(own), parallel._naming_the_loss():
            raise own("CUDA error: an illegal memory access was encountered")
    with pytest.raises(PeerLost, match="lost: Connection closed by peer"), parallel._naming_the_loss():
        raise RuntimeError("Connection closed by peer")
