"""What the server says about itself: model, tokenizer, and the counters of speculation."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from nextn.bench.errors import BenchError


@dataclass(frozen=True)
class SpecCounters:
    """Cumulative verify passes and accepted drafts, or a server's own running average of the accept length."""

    verify_passes: int | None = None
    accepted: int | None = None
    average: float | None = None


async def get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The JSON object at url, or {} where the server has none."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=20)) as response:
            if response.status == 200:
                body = msgspec.json.decode(await response.read())
                return body if isinstance(body, dict) else {}
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
        pass
    return {}


async def wait_ready(session: aiohttp.ClientSession, url: str, timeout: float) -> None:
    """Wait until the server answers /health or /v1/models. Raises BenchError after timeout seconds."""
    deadline = time.monotonic() + timeout
    last = "no attempt"
    while True:
        for path in ("/health", "/v1/models"):
            try:
                async with session.get(url + path, timeout=aiohttp.ClientTimeout(total=10)) as response:
                    if response.status == 200:
                        return
                    last = f"{path} answered HTTP {response.status}"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                last = f"{path}: {type(error).__name__}: {error}"
        if time.monotonic() >= deadline:
            raise BenchError(f"{url} was not ready within {timeout:g} s ({last}); check --base-url and --api-key")
        await asyncio.sleep(min(1.0, max(0.01, deadline - time.monotonic())))


async def find_model(session: aiohttp.ClientSession, url: str) -> str:
    """The first served model. Raises BenchError if the server lists none."""
    models = (await get_json(session, url + "/v1/models")).get("data") or []
    if not models:
        raise BenchError(f"{url}/v1/models lists no model; pass --model")
    return str(models[0]["id"])


async def find_tokenizer(session: aiohttp.ClientSession, url: str, model: str) -> tuple[str, int | None]:
    """The tokenizer's folder or name, and the vocabulary size if the server tells it."""
    info = await get_json(session, url + "/get_model_info")
    path = info.get("tokenizer_path") or ""
    size = info.get("vocab_size")
    if size is None:
        size = (await get_json(session, url + "/get_server_info")).get("vocab_size")
    return (path if path and Path(path).is_dir() else model), size


async def spec_counters(session: aiohttp.ClientSession, url: str) -> SpecCounters:
    """Read the counters: nextn's stats, sglang's average, or vLLM's metrics."""
    info = await get_json(session, url + "/get_server_info")
    stats = info.get("stats") or {}
    if "num_verify_passes" in stats:
        return SpecCounters(int(stats["num_verify_passes"]), int(sum(stats.get("accepted_per_position") or [])))
    states = info.get("internal_states") or [{}]
    average = info.get("avg_spec_accept_length") or states[0].get("avg_spec_accept_length")
    if average:
        return SpecCounters(average=float(average))
    try:
        async with session.get(url + "/metrics", timeout=aiohttp.ClientTimeout(total=20)) as response:
            text = await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, OSError, TimeoutError):
        text = ""
    drafts = _sum_metric(text, "vllm:spec_decode_num_drafts")
    accepted = _sum_metric(text, "vllm:spec_decode_num_accepted_tokens")
    return SpecCounters() if drafts is None or accepted is None else SpecCounters(drafts, accepted)


def _sum_metric(text: str, name: str) -> int | None:
    values = []
    for line in text.splitlines():
        if line.split("{")[0].split(" ")[0] in (name, name + "_total"):
            values.append(float(line.rsplit(" ", 1)[1]))
    return int(sum(values)) if values else None
