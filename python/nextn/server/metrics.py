"""Prometheus metrics: gauges and counters come from the engine's last statistics, histograms are kept here."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nextn.protocol.draft_health import DraftHealth, ShadowCounts
from nextn.protocol.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry per server; nothing is registered globally."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._ttft = Histogram(
            "nextn:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._itl = Histogram(
            "nextn:inter_token_latency_seconds",
            "Between tokens; the tokens of one step share its time evenly.",
            buckets=_ITL_BUCKETS,
            registry=self._registry,
        )
        self._e2e = Histogram(
            "nextn:e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            buckets=_E2E_BUCKETS,
            registry=self._registry,
        )
        self._queue = Histogram(
            "nextn:queue_time_seconds",
            "From a request's arrival at the engine to its first step.",
            buckets=_QUEUE_BUCKETS,
            registry=self._registry,
        )
        self._aborted = Counter(
            "nextn:num_aborted_requests",
            "Requests ended by a disconnected client or by /abort_request.",
            registry=self._registry,
        )

    def observe_first_token(self, ttft: float, queue_time: float) -> None:
        self._ttft.observe(ttft)
        self._queue.observe(queue_time)

    def observe_next_tokens(self, elapsed: float, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._itl.observe(elapsed / num_tokens)

    def observe_end(self, latency: float) -> None:
        self._e2e.observe(latency)

    def count_abort(self) -> None:
        self._aborted.inc()

    def render(self, stats: EngineStats, health: DraftHealth | None = None) -> bytes:
        """The text exposition of everything, in Prometheus' format."""
        engine = CollectorRegistry(auto_describe=False)
        engine.register(_EngineCollector(stats))
        if health is not None and health.state != "off":
            engine.register(_DraftCollector(health))
        if health is not None and health.shadow is not None:
            engine.register(_ShadowCollector(health.shadow))
        return generate_latest(self._registry) + generate_latest(engine)


class _EngineCollector(Collector):
    """The engine's statistics as metrics, made when Prometheus asks for them."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        num_used = stats.num_pages - stats.num_free_pages - stats.num_cached_pages
        yield _gauge("num_running_reqs", "Requests in the running batch.", stats.num_running)
        yield _gauge("num_queue_reqs", "Requests that wait for a place.", stats.num_queued)
        yield _gauge("token_usage", "Share of the KV pages that requests hold.", _ratio(num_used, stats.num_pages))
        yield _gauge(
            "cache_hit_rate",
            "Share of prompt tokens found in the prefix cache since start.",
            _ratio(stats.cached_tokens, stats.prompt_tokens),
        )
        yield _gauge(
            "spec_accept_length", "Tokens per verify pass since start, the target's own included.", stats.accept_length
        )
        yield _counter("prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
        yield _counter("cached_tokens", "Prompt tokens found in the prefix cache.", stats.cached_tokens)
        yield _counter("generation_tokens", "Generated tokens.", stats.generation_tokens)
        yield _counter("num_preemptions", "Requests put back into the queue for want of pages.", stats.num_preemptions)
        yield _counter("spec_num_drafts", "Verify passes.", stats.num_verify_passes)
        yield _counter("spec_num_draft_tokens", "Draft tokens proposed.", sum(stats.drafted_per_position))
        yield _counter("spec_num_accepted_tokens", "Draft tokens accepted.", sum(stats.accepted_per_position))
        yield _per_position("spec_drafted_per_position", "Draft tokens proposed.", stats.drafted_per_position)
        yield _per_position("spec_accepted_per_position", "Draft tokens accepted.", stats.accepted_per_position)


class _DraftCollector(Collector):
    """The draft's health as metrics."""

    def __init__(self, health: DraftHealth) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health = self._health
        text = "1 where the draft does not do what a working head does; alert on it."
        sick = GaugeMetricFamily("nextn:spec_draft_sick", text, labels=["reason"])
        for state in ("collapsed", "never_healthy"):
            sick.add_metric([state], health.state == state)
        sick.add_metric(["canary"], health.canary.verdict == "sick")
        yield sick
        yield _counter("spec_draft_collapses", "Times that acceptance fell to almost nothing.", health.num_collapses)
        length = GaugeMetricFamily(
            "nextn:spec_window_accept_length",
            "Tokens per verify pass over the latest drafted chains, by kind of traffic.",
            labels=["traffic"],
        )
        rates = GaugeMetricFamily(
            "nextn:spec_window_acceptance",
            "Share of the latest drafts accepted at each place of a step, by kind of traffic; position 0 is the first.",
            labels=["traffic", "position"],
        )
        for traffic, window in health.windows.items():
            length.add_metric([traffic], window.accept_length)
            for position, rate in enumerate(window.rates):
                rates.add_metric([traffic, str(position)], rate)
        yield length
        yield rates


class _ShadowCollector(Collector):
    """What the shadow check has found."""

    def __init__(self, counts: ShadowCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield _counter("shadow_requests", "Requests scored again without speculation.", counts.num_requests)
        yield _counter("shadow_tokens", "Tokens scored again without speculation.", counts.num_tokens)
        yield _counter("shadow_disagreements", "Tokens that came out otherwise; alert on it.", counts.num_disagreements)
        yield _counter("shadow_skipped", "Requests chosen and not checked, for want of time.", counts.num_skipped)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"nextn:{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"nextn:{name}", text, value=value)


def _per_position(name: str, text: str, counts: list[int]) -> CounterMetricFamily:
    text = f"{text[:-1]} at each place of a step; position 0 is the first draft."
    family = CounterMetricFamily(f"nextn:{name}", text, labels=["position"])
    for position, count in enumerate(counts):
        family.add_metric([str(position)], count)
    return family
