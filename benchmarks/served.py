"""Servers in processes of their own, as a user starts them, and a client that keeps a number of streams busy."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp

START_TIMEOUT = 120.0
"""Seconds; servers that start side by side share the cores."""


@contextmanager
def servers(commands: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Start one server per command, side by side. Gives their URLs once all are healthy; they end with the block.

    commands: a module that takes the server's flags, such as "nextn.launch_server", and the flags
    """
    running: list[tuple[subprocess.Popen[bytes], str]] = []
    try:
        for command in commands:
            port = _free_port()
            flags = ["--port", str(port), "--log-level", "error"]
            process = subprocess.Popen([sys.executable, "-m", *command, *flags], stdout=subprocess.DEVNULL)
            running.append((process, f"http://127.0.0.1:{port}"))
        deadline = time.monotonic() + START_TIMEOUT
        for process, url in running:
            _wait_healthy(process, url, deadline)
        yield [url for _, url in running]
    finally:
        for process, _ in running:
            process.send_signal(signal.SIGINT)
        for process, _ in running:
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_healthy(process: subprocess.Popen[bytes], url: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode} before it was healthy")
        try:
            with urllib.request.urlopen(f"{url}/health") as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server did not become healthy within {START_TIMEOUT:.0f} s")


def engine_info(url: str) -> dict[str, Any]:
    """The engine's own account, out of /get_server_info."""
    with urllib.request.urlopen(f"{url}/get_server_info") as response:
        found: dict[str, Any] = json.load(response)["engine"]
        return found


async def generate_all(url: str, prompts: Sequence[list[int]], num_streams: int, num_tokens: int) -> list[list[int]]:
    """Send every prompt, ``num_streams`` at a time, greedy, not streamed. Returns the output ids of each."""
    free = asyncio.Semaphore(num_streams)

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> list[int]:
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens}}
        async with free, session.post(f"{url}/generate", json=body) as response:
            response.raise_for_status()
            found: list[int] = (await response.json())["output_ids"]
            return found

    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(one(session, prompt) for prompt in prompts)))
