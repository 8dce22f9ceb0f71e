"""A picture of a run: throughput and concurrency over time, and the latency distributions."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextn.bench.metrics import chunk_gaps, chunk_tokens
from nextn.bench.runner import Run


def plot_run(run: Run, path: str, title: str) -> None:
    """Write the picture to path as a PNG."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    _throughput(axes[0, 0], run)
    good = [r for r in run.results if r.success]
    ttft = [(r.chunk_times[0] - r.start) * 1e3 for r in good if r.chunk_times]
    _cdf(axes[0, 1], "Time to first token", ttft, "#d1495b")
    _cdf(axes[1, 0], "Inter-token latency per chunk", [gap for r in good for gap in chunk_gaps(r)], "#66a182")
    _cdf(axes[1, 1], "End-to-end latency", [r.latency * 1e3 for r in good], "#8d5a97")
    figure.savefig(path, dpi=120, format="png")


def _throughput(axis: Any, run: Run) -> None:
    num_bins = 60
    edges = np.linspace(0, run.duration, num_bins + 1)
    width = run.duration / num_bins
    times = np.array([t - run.start for r in run.results for t in r.chunk_times])
    weights = np.array([n for r in run.results for n in chunk_tokens(r)])
    axis.set(title="Output throughput and concurrency", xlabel="time (s)", ylabel="output tokens / s")
    if len(times):
        rate = np.histogram(times, edges, weights=weights)[0] / width
        axis.fill_between(edges[:-1], rate, step="post", color="#2e86ab", alpha=0.35)
        axis.step(edges[:-1], rate, where="post", color="#2e86ab", label="output tokens / s")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, run.duration)
    starts = np.array([r.start for r in run.results]) - run.start
    ends = np.array([r.end for r in run.results]) - run.start
    running = [int(((starts <= at) & (ends > at)).sum()) for at in edges]
    twin = axis.twinx()
    twin.plot(edges, running, color="#f18f01", linewidth=1.8, label="running requests")
    twin.set_ylabel("running requests")
    twin.set_ylim(0, max(running) * 1.15 + 1)
    twin.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [*axis.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="lower center", fontsize=8, framealpha=0.9)
    axis.grid(alpha=0.25)


def _cdf(axis: Any, title: str, values: list[float], color: str) -> None:
    axis.set(title=title, xlabel="ms", ylabel="share of samples", ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    if not values:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="gray")
        return
    ordered = np.sort(values)
    axis.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", color=color, linewidth=2)
    for percentile, style in ((50, "-"), (90, "--"), (99, ":")):
        at = float(np.percentile(ordered, percentile))
        axis.axvline(at, color="gray", linestyle=style, linewidth=1, label=f"P{percentile} {at:.1f} ms")
    axis.legend(loc="lower right", fontsize=8)
