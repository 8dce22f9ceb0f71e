"""What HTTP streaming costs: the server under concurrent streaming clients against the offline API, same prompts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

import aiohttp
from nextn.llm import LLM, SamplingParams

from benchmarks.common import alternate, parser, prompts, ratio, report, timed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(model_path: str | None, port: int) -> subprocess.Popen[bytes]:
    """Launch the server as a user would, and wait until it is healthy."""
    command = [sys.executable, "-m", "nextn.launch_server", "--port", str(port), "--log-level", "warning"]
    command += ["--disable-radix-cache", *(["--model-path", model_path] if model_path else [])]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
                if response.status == 200:
                    return server
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not become healthy within 60 s")


async def stream_all(url: str, batch: list[list[int]], num_tokens: int) -> int:
    """Stream every prompt at once; returns the number of tokens received."""

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> int:
        body = {
            "input_ids": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        }
        last: dict[str, Any] = {}
        async with session.post(f"{url}/generate", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
        return int(last["meta_info"]["completion_tokens"])

    async with aiohttp.ClientSession() as session:
        return sum(await asyncio.gather(*(one(session, prompt) for prompt in batch)))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--num-streams", type=int, default=16)
    made.add_argument("--num-tokens", type=int, default=192, help="generated per stream")
    args = made.parse_args()
    llm = LLM(args.model_path, disable_radix_cache=True)
    batch = prompts(llm, args.num_streams)
    params = SamplingParams(temperature=0, max_new_tokens=args.num_tokens, ignore_eos=True)
    port = free_port()
    server = start_server(args.model_path, port)

    def offline() -> float:
        seconds, outputs = timed(lambda: llm.generate(batch, params))
        return sum(len(out.output_ids) for out in outputs) / seconds

    def http() -> float:
        seconds, tokens = timed(lambda: asyncio.run(stream_all(f"http://127.0.0.1:{port}", batch, args.num_tokens)))
        return tokens / seconds

    try:
        figures = alternate({"offline": offline, "http": http}, 3 if args.quick else 9)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    share = ratio(figures["http"], figures["offline"])
    middle = {name: sorted(values)[len(values) // 2] for name, values in figures.items()}
    row = {
        "streams": args.num_streams,
        "offline tok/s": middle["offline"],
        "HTTP tok/s": middle["http"],
        "HTTP / offline": share,
        "cost %": 100 * (1 - share),
    }
    report("HTTP streaming against the offline API", [row], args.json)


if __name__ == "__main__":
    main()
