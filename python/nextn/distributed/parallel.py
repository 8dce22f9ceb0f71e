"""A group of ranks that hold a model together. Alone, every operation gives back what it was given.

Tensors go where they are: NCCL between GPUs, gloo between CPUs. Control messages are bytes over gloo, from rank 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch.nn import functional as F

from nextn.errors import ConfigError, PeerLost

HEAD_BYTES = 8192
"""Of a message, sent at once together with its length; most messages have no more."""
LENGTH_BYTES = 8
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13 has it under a new name."""

MEETING_POLL = 0.05
"""Seconds between two looks whether all ranks are there."""

SIOCGIFADDR = 0x8915
"""Linux's ioctl for an interface's IPv4 address."""

SIGNS_OF_A_LOSS = (
    *("ncclRemoteError", "remote process exited", "Connection closed", "Connection was likely closed"),
    *("Connection reset", "Broken pipe"),
)
"""What NCCL's errors, and torch's around them, say where another rank is gone."""


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its group. Every rank must make the same calls in the same order.

    Tensors without memory (of torch's device meta) are not exchanged.

    ranks_per_node: ranks that share a machine
    Raises PeerLost from any call if another rank is gone, torch's DistBackendError if NCCL fails otherwise.
    """

    rank: int = 0
    size: int = 1
    ranks_per_node: int = 1

    @property
    def local_rank(self) -> int:
        """The rank's place on its machine, and so the number of its device."""
        return self.rank % self.ranks_per_node

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in place."""
        if self.size > 1 and not x.is_meta:
            with _naming_the_loss():
                dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x side by side. x: [R, n], of one shape everywhere. Returns [R, size · n]."""
        if self.size == 1:
            return x
        num_rows, width = x.shape
        parts = x.new_empty(self.size * num_rows, width)
        if not x.is_meta:
            with _naming_the_loss():
                _all_gather(parts, x.contiguous())
        return parts.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, -1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x, in place."""
        if self.size > 1 and not x.is_meta:
            with _naming_the_loss():
                dist.broadcast(x, 0)
        return x

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor([value], device="cpu")
        with _naming_the_loss():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found[0])

    def wait(self) -> None:
        """Until all ranks are here."""
        self.least(0)

    def send(self, message: bytes) -> None:
        """From rank 0 to all others, who receive it."""
        if self.size == 1:
            return
        framed = bytearray(len(message).to_bytes(LENGTH_BYTES, "little") + message)
        framed += bytes(max(HEAD_BYTES - len(framed), 0))
        data = torch.frombuffer(framed, dtype=torch.uint8)
        with _naming_the_loss():
            dist.broadcast(data[:HEAD_BYTES], 0)
            if len(framed) > HEAD_BYTES:
                dist.broadcast(data[HEAD_BYTES:], 0)

    def receive(self) -> bytes:
        """What rank 0 sends."""
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8, device="cpu")
        with _naming_the_loss():
            dist.broadcast(head, 0)
            framed = head.numpy().tobytes()
            length = LENGTH_BYTES + int.from_bytes(framed[:LENGTH_BYTES], "little")
            if length > HEAD_BYTES:
                rest = torch.empty(length - HEAD_BYTES, dtype=torch.uint8, device="cpu")
                dist.broadcast(rest, 0)
                framed += rest.numpy().tobytes()
        return framed[LENGTH_BYTES:length]

    def gather_columns(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        """All ranks' columns of a matrix of ``num_columns``, of which each but the last ones has as many as the first.

        x: [R, n], this rank's. Returns [R, num_columns].
        """
        if self.size == 1:
            return x
        width = -(-num_columns // self.size)
        if x.shape[1] < width:
            x = F.pad(x, (0, width - x.shape[1]))
        return self.all_gather(x)[:, :num_columns]


SINGLE = TensorParallel()


def join(
    tp: TensorParallel,
    *,
    rendezvous: str | None,
    device: torch.device,
    timeout: float,
    while_waiting: Callable[[], None] = lambda: None,
    listener: socket.socket | None = None,
) -> None:
    """Meet the other ranks, before the first operation. A process is in one group at a time, until it ``leave``s.

    rendezvous: "file://PATH" for ranks of one machine, or "tcp://HOST:PORT", where rank 0 listens. Sockets between
        ranks use the loopback interface with a file, else the interface towards rank 0, unless the environment says
        another one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); that of NCCL's own files does not count
    device: where the tensors will be; a CUDA device becomes the process's current one
    timeout: seconds to wait, for the others here and in each later call
    while_waiting: called now and then until all are here; may raise
    listener: of rank 0, a socket that listens at HOST:PORT already
    Raises ConfigError if nobody can meet there, if ranks compute on devices of other types, or if NCCL cannot begin;
    PeerLost if the others do not come.
    """
    if tp.size == 1:
        return
    assert rendezvous is not None, "several ranks need a place to meet"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL asks for it
    try:
        store = _store_at(rendezvous, tp, timeout, listener)
    except RuntimeError as error:
        raise ConfigError(
            f"{rendezvous}: the ranks cannot meet there: {_sentence(error)}; give a free port of node 0"
        ) from error
    with _naming_the_loss(begins=True), _sockets_over(_interface_towards(rendezvous)):
        store.set(f"here/{tp.rank}", device.type)
        deadline = time.monotonic() + timeout
        while not store.check([f"here/{rank}" for rank in range(tp.size)]):
            while_waiting()
            if time.monotonic() > deadline:
                raise PeerLost(f"not all of {tp.size} ranks came to {rendezvous} within {timeout:g} s")
            time.sleep(MEETING_POLL)
        for rank in range(tp.size):
            if (found := store.get(f"here/{rank}").decode()) != device.type:
                raise ConfigError(
                    f"--device: rank {rank} computes on {found}, rank {tp.rank} on {device.type}; give all nodes the "
                    "same --device, cuda to see why a GPU is not found"
                )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=tp.rank,
            world_size=tp.size,
            timeout=timedelta(seconds=timeout),
        )
        if device.type == "cuda":
            tp.all_reduce(torch.zeros(1, device=device))  # what NCCL cannot do shows before anything is loaded


def _store_at(rendezvous: str, tp: TensorParallel, timeout: float, listener: socket.socket | None) -> dist.Store:
    where = urlparse(rendezvous)
    if where.scheme == "file":
        return dist.FileStore(where.path, tp.size)
    assert where.hostname is not None, "the address was checked where it was read"
    assert where.port is not None, "the address was checked where it was read"
    return dist.TCPStore(
        where.hostname,
        where.port,
        tp.size,
        is_master=tp.is_first,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def leave(tp: TensorParallel) -> None:
    """End the group that ``join`` began."""
    if tp.size > 1:
        dist.destroy_process_group()


def abandon() -> None:
    """End the group that this process is in, if it is in one, without a word to ranks that may be lost."""
    if not dist.is_initialized():
        return
    if "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()  # also ends what waits on the GPU
    else:
        dist.destroy_process_group()


def _interface_towards(rendezvous: str) -> str | None:
    """The network interface over which the first rank's machine is reached; None where the system does not say."""
    where = urlparse(rendezvous)
    if where.scheme == "file":
        return LOOPBACK
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((where.hostname, where.port))  # sends nothing
        address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                if found[20:24] == address:
                    return name
    return None


@contextlib.contextmanager
def _naming_the_loss(*, begins: bool = False) -> Iterator[None]:
    """begins: whether what NCCL cannot do is a matter of the machine's configuration"""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of this rank's own device
        raise
    except RuntimeError as error:  # gloo raises nothing narrower
        if isinstance(error, dist.DistBackendError) and not any(sign in str(error) for sign in SIGNS_OF_A_LOSS):
            if not begins:
                raise
            raise ConfigError(
                f"NCCL: {_why_nccl_failed(str(error))}; start with NCCL_DEBUG=INFO to see more"
            ) from error
        raise PeerLost(f"the connection to another rank was lost: {_sentence(error)}") from error


def _sentence(error: RuntimeError) -> str:
    """The first; torch adds advice and a stack of C++."""
    return str(error).partition("\n")[0].partition(". ")[0]


def _why_nccl_failed(message: str) -> str:
    """NCCL's own words where it says any, which torch puts below its own."""
    _, _, own = message.partition("Last error:\n")
    return (own.strip() or message).partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def _sockets_over(interface: str | None) -> Iterator[None]:
    """gloo and NCCL take their interface from the environment only. What the user has set stays."""
    wanted = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
