"""Figures from observations. Latencies are milliseconds, throughputs per second."""

from collections import Counter
from typing import Any

import numpy as np

from nextn.bench.runner import Run
from nextn.bench.types import RequestResult


def summarize(values: list[float], percentiles: tuple[int, ...]) -> dict[str, float | None]:
    """Mean, median, percentiles (linear interpolation) and max; None for each if there are no values."""
    if not values:
        return dict.fromkeys(("mean", "median", *(f"p{p}" for p in percentiles), "max"))
    array = np.asarray(values)
    out: dict[str, float | None] = {"mean": float(array.mean()), "median": float(np.median(array))}
    out |= {f"p{p}": float(np.percentile(array, p)) for p in percentiles}
    return out | {"max": float(array.max())}


def chunk_tokens(result: RequestResult) -> list[int]:
    """Tokens of each chunk; one each where nothing better is known."""
    known = result.chunk_tokens
    return known if len(known) == len(result.chunk_times) else [1] * len(result.chunk_times)


def chunk_gaps(result: RequestResult) -> list[float]:
    """Inter-token latency per arriving chunk, ms."""
    return [float(gap) for gap in np.diff(result.chunk_times) * 1e3]


def token_gaps(result: RequestResult) -> list[float]:
    """Inter-token latency per token, ms: a chunk of n tokens after a gap g counts as n gaps of g / n."""
    pairs = zip(chunk_gaps(result), chunk_tokens(result)[1:], strict=True)
    return [gap / n for gap, n in pairs for _ in range(n)]


def time_per_output_token(result: RequestResult) -> float | None:
    """(last arrival - first arrival) / (output tokens - 1), ms: the field's definition; None below two of either."""
    if len(result.chunk_times) < 2 or result.output_tokens < 2:
        return None
    return (result.chunk_times[-1] - result.chunk_times[0]) * 1e3 / (result.output_tokens - 1)


def accept_length(run: Run) -> float | None:
    """(accepted drafts + verify passes) / verify passes: the server's counters first, then the requests' own."""
    before, after = run.before, run.after
    if after.verify_passes is not None and after.accepted is not None:
        passes = after.verify_passes - (before.verify_passes or 0)
        accepted = after.accepted - (before.accepted or 0)
        if passes > 0:
            return (accepted + passes) / passes
    known = [r for r in run.results if r.success and r.spec_verify_ct]
    if known:
        return sum(r.output_tokens for r in known) / sum(r.spec_verify_ct or 0 for r in known)
    return after.average


def peak_output_throughput(run: Run) -> float | None:
    """Highest rate of arriving tokens over any window of 1 s (or of the run, if shorter); None without streaming."""
    arrivals = sorted(
        pair for result in run.results for pair in zip(result.chunk_times, chunk_tokens(result), strict=True)
    )
    if not arrivals:
        return None
    window = min(1.0, run.duration)
    times = np.array([at for at, _ in arrivals])
    cu_tokens = np.concatenate([[0], np.cumsum([tokens for _, tokens in arrivals])])
    before = np.searchsorted(times, times - window, side="right")
    return float((cu_tokens[1:] - cu_tokens[before]).max() / window)


def compute(run: Run) -> dict[str, Any]:
    """All figures of a run, flat, by the names of the JSON line."""
    good = [r for r in run.results if r.success]
    duration = run.duration
    inputs = sum(r.prompt_tokens if r.prompt_tokens is not None else r.prompt_len for r in good)
    outputs = sum(r.output_tokens for r in good)
    retokenized = [r.retokenized_tokens for r in good]
    figures: dict[str, Any] = {
        "completed": len(good),
        "failed": len(run.results) - len(good),
        "errors": dict(Counter(r.error for r in run.results if not r.success)),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_output_tokens_retokenized": None if None in retokenized else sum(n or 0 for n in retokenized),
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "peak_output_throughput": peak_output_throughput(run),
        "total_throughput": (inputs + outputs) / duration,
        "concurrency": sum(r.latency for r in good) / duration,
        "accept_length": accept_length(run),
    }
    ttft = [(r.chunk_times[0] - r.start) * 1e3 for r in good if r.chunk_times]
    tpot = [value for r in good if (value := time_per_output_token(r)) is not None]
    groups = {
        "e2e_latency": ([r.latency * 1e3 for r in good], (90, 99)),
        "ttft": (ttft, (90, 99)),
        "tpot": (tpot, (90, 99)),
        "itl": ([gap for r in good for gap in chunk_gaps(r)], (95, 99)),
        "itl_per_token": ([gap for r in good for gap in token_gaps(r)], (95, 99)),
    }
    for name, (values, percentiles) in groups.items():
        for statistic, value in summarize(values, percentiles).items():
            if statistic != "max" or name.startswith("itl"):
                figures[f"{statistic}_{name}_ms"] = value
    return figures


def details(run: Run) -> dict[str, list[Any]]:
    """Per-request arrays of a run, in the order of sending. Times in seconds after the run's start."""
    return {
        "start_times": [r.start - run.start for r in run.results],
        "latencies": [r.latency for r in run.results],
        "ttfts": [r.chunk_times[0] - r.start if r.chunk_times else None for r in run.results],
        "itls": [[gap / 1e3 for gap in chunk_gaps(r)] for r in run.results],
        "chunk_tokens": [chunk_tokens(r) for r in run.results],
        "input_lens": [r.prompt_tokens if r.prompt_tokens is not None else r.prompt_len for r in run.results],
        "output_lens": [r.output_tokens for r in run.results],
        "generated_texts": [r.text for r in run.results],
        "request_errors": [r.error for r in run.results],
    }
