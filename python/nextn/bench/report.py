"""The table on the screen, the JSON line, and the comparison of two lines."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextn.bench.errors import BenchError
from nextn.bench.options import BenchOptions

WIDTH = 62


def _row(label: str, value: Any) -> str:
    if value is None:
        value = "n/a"
    text = f"{value:.2f}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return f"{label:<44}{text:<18}".rstrip()


def format_table(options: BenchOptions, figures: Mapping[str, Any]) -> str:
    """The result table, in the shape of sglang's."""
    f = figures
    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        _row("Backend:", options.backend),
        _row("Traffic request rate:", options.request_rate),
        _row("Max request concurrency:", options.max_concurrency or "not set"),
        _row("Successful requests:", f["completed"]),
        _row("Failed requests:", f["failed"]),
    ]
    lines += [f"  {count} x {reason}" for reason, count in f["errors"].items()]
    lines += [
        _row("Benchmark duration (s):", f["duration"]),
        _row("Total input tokens:", f["total_input_tokens"]),
        _row("Total generated tokens:", f["total_output_tokens"]),
    ]
    if f["total_output_tokens_retokenized"] not in (None, f["total_output_tokens"]):
        lines.append(_row("Total generated tokens (retokenized):", f["total_output_tokens_retokenized"]))
    lines += [
        _row("Request throughput (req/s):", f["request_throughput"]),
        _row("Input token throughput (tok/s):", f["input_throughput"]),
        _row("Output token throughput (tok/s):", f["output_throughput"]),
        _row("Peak output token throughput (tok/s):", f["peak_output_throughput"]),
        _row("Total token throughput (tok/s):", f["total_throughput"]),
        _row("Concurrency:", f["concurrency"]),
        _row("Accept length:", f["accept_length"]),
    ]
    sections: list[tuple[str, str, str, tuple[str, ...]]] = [
        ("End-to-End Latency", "E2E Latency", "e2e_latency", ("mean", "median", "p90", "p99")),
        ("Time to First Token", "TTFT", "ttft", ("mean", "median", "p90", "p99")),
        ("Time per Output Token (excl. 1st token)", "TPOT", "tpot", ("mean", "median", "p90", "p99")),
        ("Inter-Token Latency (per chunk)", "ITL", "itl", ("mean", "median", "p95", "p99", "max")),
    ]
    if f["mean_itl_per_token_ms"] != f["mean_itl_ms"]:
        sections.append(
            (
                "Inter-Token Latency (per token of a chunk)",
                "ITL",
                "itl_per_token",
                ("mean", "median", "p95", "p99", "max"),
            )
        )
    for title, label, key, statistics in sections:
        lines.append(f"{title:-^{WIDTH}}")
        for statistic in statistics:
            shown = statistic.upper() if statistic.startswith("p") else statistic.capitalize()
            lines.append(_row(f"{shown} {label} (ms):", f[f"{statistic}_{key}_ms"]))
    return "\n".join([*lines, "=" * WIDTH])


def json_line(
    options: BenchOptions, model: str, figures: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a run: date, arguments (without the key), figures, and arrays if any."""
    arguments = {k: v for k, v in vars(options).items() if k not in ("api_key", "compare")}
    arguments["model"] = model
    if not math.isfinite(options.request_rate):
        arguments["request_rate"] = "inf"  # JSON has no infinity
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "arguments": arguments, **figures, **arrays}


def append_line(path: str, record: Mapping[str, Any]) -> None:
    """Append record to path as one line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _last_line(path: str) -> dict[str, Any]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        record = json.loads(lines[-1])
    except (OSError, IndexError, json.JSONDecodeError) as error:
        raise BenchError(f"--compare {path}: no readable JSON line ({type(error).__name__}: {error})") from error
    if not isinstance(record, dict) or "arguments" not in record:
        raise BenchError(f"--compare {path}: the last line is not a record of this benchmark")
    return record


def compare(path_a: str, path_b: str) -> str:
    """A table of both files' last lines, the ratio B/A of each figure, and the arguments that differ."""
    a, b = _last_line(path_a), _last_line(path_b)
    lines = [f"A: {path_a} ({a.get('date')})", f"B: {path_b} ({b.get('date')})"]
    ignored = {"output_file", "output_details", "plot", "disable_tqdm"}
    names = [n for n in {**a["arguments"], **b["arguments"]} if n not in ignored]
    differing = [n for n in names if a["arguments"].get(n) != b["arguments"].get(n)]
    lines.append("arguments that differ:" if differing else "arguments: the same")
    for n in differing:
        flag = "--" + n.replace("_", "-")
        lines.append(f"  ! {flag}: A {a['arguments'].get(n)}, B {b['arguments'].get(n)}")
    lines.append(f"{'figure':<36}{'A':>14}{'B':>14}{'B/A':>9}")
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        kinds = [v for v in (x, y) if v is not None]
        if not kinds or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in kinds):
            continue
        ratio = f"{y / x:.3f}" if x and y is not None else "n/a"
        shown = ["n/a" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in (x, y)]
        lines.append(f"{name:<36}{shown[0]:>14}{shown[1]:>14}{ratio:>9}")
    return "\n".join(lines)
