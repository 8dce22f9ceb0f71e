"""A group's operations alone, and what ranks agree on before they load."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import torch.distributed as dist
from nextn.config.engine_config import EngineConfig
from nextn.distributed import parallel
from nextn.distributed.parallel import SINGLE, TensorParallel, join, leave
from nextn.errors import ConfigError, PeerLost
from nextn.execution import rank_process
from nextn.execution.rank_process import _check_agreement
from nextn.execution.ranks import places_of_node
from nextn.layers.norm import RMSNorm, sum_over_ranks

from tests.server.conftest import wait_until


@dataclass(frozen=True)
class Told(TensorParallel):
    """A rank that receives ``message``."""

    message: bytes = b""

    def receive(self) -> bytes:
        return self.message


@dataclass(frozen=True)
class Alike(TensorParallel):
    """A rank among others whose tensors are the same. Their sum is rounded at every rank, as NCCL's is."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = x
        for _ in range(self.size - 1):
            total = total + x
        return total


@pytest.mark.parametrize("rank", [0, 1])
def test_what_came_before_a_layer_is_added_once_and_rounded_once(rank: int) -> None:
    """The stream is much larger than what a layer adds, and bfloat16 has eight bits."""
    generator = torch.Generator().manual_seed(rank)
    mine, before = (torch.randn(50, 64, generator=generator).to(torch.bfloat16) for _ in range(2))
    before = before * 64
    exact = before.double() + 8 * mine.double()
    parts = sum_over_ranks(Alike(rank, 8), lambda given: mine if given is None else mine + given, before)
    norm = RMSNorm(64, 1e-5, "norm", torch.bfloat16)
    norm.weight.fill_(1)
    total, normed = norm.forward_for(parts, None)
    assert isinstance(normed, torch.Tensor)
    torch.testing.assert_close(total.double(), exact, rtol=2**-8, atol=8 * 8 * 2**-8)  # a rounding, and the terms' own
    torch.testing.assert_close(norm.forward(parts), normed, rtol=0, atol=0)
    torch.testing.assert_close(
        sum_over_ranks(Alike(rank, 8), lambda given: mine, None), Alike(rank, 8).all_reduce(mine)
    )


def test_alone_every_operation_gives_back_what_it_got() -> None:
    x = torch.randn(3, 4)
    for operation in (SINGLE.all_reduce, SINGLE.all_gather, SINGLE.broadcast):
        assert operation(x) is x
    assert SINGLE.gather_columns(x, 4) is x
    assert SINGLE.least(7) == 7
    join(SINGLE, rendezvous=None, device=torch.device("cpu"), timeout=1)
    leave(SINGLE)


def test_a_group_on_gpus_is_aborted_where_it_cannot_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of NCCL's waits for a lost rank until then."""
    calls: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("aborted"))
    parallel.abandon()
    assert calls == ["aborted"]


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


def nccl_error(kind: str, own: str) -> dist.DistBackendError:
    """As torch words it."""
    return dist.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
        f"NCCL_DEBUG=INFO for details), NCCL version 2.29.3\n{kind}: A call failed. \nLast error:\n{own}\n"
    )


def test_what_nccl_says_is_told_and_taken_for_a_loss_only_where_it_is_one() -> None:
    full = "Error while creating shared memory segment /dev/shm/nccl-ab, error: No space left on device (28)"
    with pytest.raises(ConfigError) as found, parallel._naming_the_loss(begins=True), parallel._naming_the_loss():
        raise nccl_error("ncclSystemError", full)
    assert str(found.value) == f"NCCL: {full}; start with NCCL_DEBUG=INFO to see more"
    with pytest.raises(dist.DistBackendError), parallel._naming_the_loss():
        raise nccl_error("ncclUnhandledCudaError", "Cuda failure 700 'an illegal memory access was encountered'")
    for kind, own in (
        ("ncclRemoteError", "socketProgress: Connection closed by remote peer"),
        ("ncclSystemError", "Call to recv failed: Connection reset by peer"),
    ):
        with pytest.raises(PeerLost, match="another rank was lost"), parallel._naming_the_loss(begins=True):
            raise nccl_error(kind, own)
    with pytest.raises(PeerLost), parallel._naming_the_loss(begins=True):
        raise dist.DistBackendError("[1] is setting up NCCL communicator: got 0 bytes. Connection was likely closed.")


def test_ranks_on_devices_of_other_types_do_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose GPU is not found would wait for exchanges that no other takes part in."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    store = dist.FileStore(str(tmp_path / "r"), 2)
    store.set("here/1", "cpu")
    with pytest.raises(ConfigError, match="--device: rank 1 computes on cpu, rank 0 on cuda; give all nodes the same"):
        join(TensorParallel(0, 2), rendezvous=f"file://{tmp_path}/r", device=torch.device("cuda", 0), timeout=5)


def test_sockets_between_ranks_are_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with parallel._sockets_over("eth3"):
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth3", "=ib0")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=ib0"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    with parallel._sockets_over("eth3"):
        assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth3"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_a_fault_of_this_ranks_own_device_is_no_loss_of_another() -> None:
    for own in (torch.OutOfMemoryError, torch.AcceleratorError):
        with pytest.raises(own), parallel._naming_the_loss():
            raise own("CUDA error: an illegal memory access was encountered")
    with pytest.raises(PeerLost, match="lost: Connection closed by peer"), parallel._naming_the_loss():
        raise RuntimeError("Connection closed by peer")


def test_a_rank_that_follows_fails_when_its_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for rank 0 then, and rank 0 for its GPU."""
    faults: list[RuntimeError] = []
    told: list[Exception] = []

    def query() -> bool:
        for one in faults:
            raise one
        return False

    monkeypatch.setattr(rank_process, "DEVICE_POLL", 0.01)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=query))
    with rank_process.ending_with_device(torch.device("cuda", 1), told.append):
        time.sleep(0.1)
        assert not told
        faults.append(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
        wait_until(lambda: bool(told), 5)
    assert told == faults
