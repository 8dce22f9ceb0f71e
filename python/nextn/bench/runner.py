"""Sends the requests: Poisson arrivals, bounded concurrency, warm-up first."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from nextn.bench.backends import send
from nextn.bench.datasets import make_requests
from nextn.bench.errors import BenchError
from nextn.bench.options import BenchOptions
from nextn.bench.server_info import SpecCounters, find_model, find_tokenizer, spec_counters, wait_ready
from nextn.bench.tokenizer import Tokenizer, count_tokens, load_tokenizer
from nextn.bench.types import BenchRequest, RequestResult


@dataclass(frozen=True)
class Run:
    """One finished run. Times are seconds."""

    model: str
    results: list[RequestResult]
    start: float
    duration: float
    before: SpecCounters
    after: SpecCounters


async def run_benchmark(options: BenchOptions) -> Run:
    """Make the dataset, warm up, send, and observe. Raises BenchError if the run cannot start."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=options.stall_timeout)
    # limit=0: the pool never queues a request whose clock already runs.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=2**20
    ) as session:
        await wait_ready(session, options.url, options.ready_check_timeout)
        model = options.model or await find_model(session, options.url)
        tokenizer, vocab_size = await _tokenizer(session, options, model)
        requests = make_requests(options, tokenizer, vocab_size)
        await _warm_up(session, options, model, requests)
        before = await spec_counters(session, options.url)
        start = time.perf_counter()
        results = await _send_all(session, options, model, requests)
        duration = max(result.end for result in results) - start
        after = await spec_counters(session, options.url)
    if tokenizer is not None:
        retokenize(results, tokenizer)
    return Run(model, results, start, duration, before, after)


async def _tokenizer(
    session: aiohttp.ClientSession, options: BenchOptions, model: str
) -> tuple[Tokenizer | None, int | None]:
    name, vocab_size = await find_tokenizer(session, options.url, model)
    ids_only = options.dataset_name == "random-ids" and not options.tokenizer
    if ids_only and vocab_size and not Path(name).is_dir():
        return None, vocab_size  # enough to make the prompts; no hub is asked
    try:
        return load_tokenizer(options.tokenizer or name), vocab_size
    except BenchError:
        if not ids_only:
            raise
        return None, vocab_size


async def _warm_up(
    session: aiohttp.ClientSession, options: BenchOptions, model: str, requests: list[BenchRequest]
) -> None:
    if options.warmup_requests:
        sends = [send(session, options.url, requests[0], options, model) for _ in range(options.warmup_requests)]
        results = await asyncio.gather(*sends)
        if not any(result.success for result in results):
            raise BenchError(f"every warm-up request failed: {results[0].error}")
    if options.flush_cache:
        try:
            async with session.post(options.url + "/flush_cache") as response:
                status = response.status
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            raise BenchError(f"--flush-cache: {type(error).__name__}: {error}") from None
        if status != 200:
            raise BenchError(f"--flush-cache: /flush_cache answered HTTP {status}")


async def _send_all(
    session: aiohttp.ClientSession, options: BenchOptions, model: str, requests: list[BenchRequest]
) -> list[RequestResult]:
    slots = asyncio.Semaphore(options.max_concurrency) if options.max_concurrency else None
    rng = np.random.default_rng(options.seed + 1)
    gaps = rng.exponential(1 / options.request_rate, len(requests)) if np.isfinite(options.request_rate) else None
    bar: tqdm[Any] = tqdm(total=len(requests), disable=options.disable_tqdm, unit="req")

    async def one(request: BenchRequest) -> RequestResult:
        if slots is None:
            result = await send(session, options.url, request, options, model)
        else:
            async with slots:
                result = await send(session, options.url, request, options, model)
        bar.update()
        return result

    tasks = []
    due = time.perf_counter()
    for index, request in enumerate(requests):
        if gaps is not None and index:
            due += gaps[index]  # absolute due times: a late wake-up does not lower the rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(request)))
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        bar.close()


def retokenize(results: list[RequestResult], tokenizer: Tokenizer) -> None:
    """After the run: count the texts' tokens, and those of each chunk where the server did not say."""
    for result in results:
        if result.success and result.text:
            result.retokenized_tokens = count_tokens(tokenizer, result.text)
            if not result.chunk_tokens:
                result.chunk_tokens = [max(1, count_tokens(tokenizer, text)) for text in result.chunk_texts]
