"""A pair of Unix sockets in a private directory that carry messages between the server and the engine process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from nextn.errors import ConfigError
from nextn.protocol.messages import FromEngine, ToEngine


def private_socket_dir() -> Path:
    """Make a directory of mode 0700 for the sockets. The caller removes it.

    It lies in /tmp where the path of a socket in TMPDIR would be longer than the system allows.
    Raises ConfigError where nothing can be written.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix="nextn-"))
        if len(os.fsencode(path / "from_engine")) > zmq.IPC_PATH_MAX_LEN:
            path.rmdir()
            path = Path(tempfile.mkdtemp(prefix="nextn-", dir="/tmp"))
    except OSError as error:
        raise ConfigError(
            f"no place for the engine's sockets ({error}); set TMPDIR to a folder that can be written"
        ) from error
    os.chmod(path, 0o700)
    return path


class EngineEnd:
    """The engine's side, synchronous: the engine owns its thread."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.connect(f"ipc://{directory}/to_engine")
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.connect(f"ipc://{directory}/from_engine")
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, timeout_ms: int) -> list[ToEngine]:
        """All messages that are here, after waiting up to ``timeout_ms`` (0: do not wait) for the first."""
        messages: list[ToEngine] = []
        if not self._inbox.poll(timeout_ms):
            return messages
        while True:
            try:
                messages.append(self._decoder.decode(self._inbox.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, message: FromEngine) -> None:
        self._outbox.send(self._encoder.encode(message))

    def close(self) -> None:
        """Wait up to a second for what was sent to leave, then close."""
        self._context.destroy(linger=1000)


def send_last_words(directory: Path, message: FromEngine) -> None:
    """From a process that has no engine's end: one message to the server, which gets up to a second to leave."""
    context = zmq.Context()
    outbox = context.socket(zmq.PUSH)
    outbox.connect(f"ipc://{directory}/from_engine")
    outbox.send(msgspec.msgpack.encode(message))
    context.destroy(linger=1000)


class ServerEnd:
    """The server's side, on asyncio."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.asyncio.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.bind(f"ipc://{directory}/to_engine")
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(f"ipc://{directory}/from_engine")
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._encoder = msgspec.msgpack.Encoder()

    async def send(self, message: ToEngine) -> None:
        await self._outbox.send(self._encoder.encode(message))

    async def receive(self) -> FromEngine:
        message: FromEngine = self._decoder.decode(await self._inbox.recv())
        return message

    def close(self) -> None:
        self._context.destroy(linger=200)
