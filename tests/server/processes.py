"""Start a server as its own process, as a person does, and see how it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.server.conftest import wait_until

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Launched:
    """A server process; ``out`` and ``err`` grow as it prints."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=False)

    def wait_ready(self, timeout: float = 30.0) -> None:
        wait_until(lambda: self.is_ready or self.process.poll() is not None, timeout)
        assert self.is_ready, "".join(self.err)

    @property
    def is_ready(self) -> bool:
        """True once the whole ready block is there; its last line is the body of the example."""
        return any(line.startswith("  -d ") for line in self.out)

    def signal(self, number: int) -> None:
        """Signal the whole process group, as Ctrl-C in a terminal does."""
        os.killpg(self.process.pid, number)

    def wait(self, timeout: float = 20.0) -> int:
        """The exit code; checks that no process and no file is left."""
        code = self.process.wait(timeout)
        wait_until(lambda: not self.children())
        assert list(self.temporary.iterdir()) == []
        return code

    def children(self) -> list[int]:
        """Live processes of the server's group other than the server itself."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.process.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return found

    def engine_pid(self) -> int:
        """The engine is the child that is not multiprocessing's resource tracker."""
        (pid,) = [p for p in self.children() if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
        return pid


@contextlib.contextmanager
def launched(
    *flags: str, module: str = "tests.server.fake_launch", fake: str = "", port: int | None = None
) -> Iterator[Launched]:
    """Run a launcher; whatever happens, nothing of it outlives the block."""
    temporary = Path(tempfile.mkdtemp(prefix="nx"))
    port = free_port() if port is None else port
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port", str(port), *flags],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary), "FAKE_ENGINE": fake},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = Launched(process, f"http://127.0.0.1:{port}", temporary)
    readers = [
        threading.Thread(target=lines.extend, args=(stream,), daemon=True)
        for lines, stream in ((running.out, process.stdout), (running.err, process.stderr))
        if stream is not None
    ]
    for reader in readers:
        reader.start()
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(5)
        shutil.rmtree(temporary, ignore_errors=True)
