"""Watches acceptance while serving, so that a draft that stops working cannot go unnoticed.

Counting happens on the engine's thread for every drafted chain, so it is one dictionary update (0.5 µs); all else is
done once per generation of chains. Windows are measured in chains that were drafted, not in time or steps: where drafts
do not pay the policy hardly drafts, and what it does draft still shows whether the head works.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator

from nextn.protocol.draft_health import Acceptance, DraftState
from nextn.scheduler.scheduler import Decision, Extend

GENERATION, GENERATION_STEPS = 32, 4
"""Chains and steps, at least, after which windows move on. Chains of one step say less than as many of several: where
many clients ask the same, all of a step's chains are accepted or rejected together."""

ALARM_GENERATIONS = 8
"""The alarm's window: 256 chains of 32 steps, or more. In 500 varied requests to the embedded model, one at a time, no
such window accepted less than 70 % of first drafts, the mean being 83 %; a window of 64, which a single odd answer can
fill, went down to 41 %. The policy goes on drafting for some 200 chains after a collapse, so a few streams fill the
window before drafts are rare."""

REPORT_GENERATIONS = 128
"""The reported window: 4,096 chains or more."""

HEALTHY_RATE = 0.4
"""Acceptance of the first draft that only a working head reaches. Published accept lengths of GLM-4.5 … 4.7 with 3
drafts, 2.0 to 3.1, mean 0.54 and more; heads that are loaded wrongly stay at 1.0 to 1.4, which is 0.3 at most."""

COLLAPSED_SHARE = 0.3
"""A first draft accepted this many times as often as it used to be is a collapse."""

NEVER_HEALTHY_AFTER = 512
"""Chains, two alarm windows, within which a working head has shown itself."""

LOG_EVERY = 60.0
REPORT_EVERY = 2.0
"""Seconds between two lines in the log, and between two reports to the server."""

PROMPT_LENGTHS = (128, 1024, 8192)
"""Upper bounds of the buckets of prompt lengths, in tokens."""

_BUCKETS = ("prompt_len<=128", "prompt_len<=1024", "prompt_len<=8192", "prompt_len>8192")
_USUAL_MEMORY = 1 / 64
"""Weight of one window in what is usual: small, so that the windows of a collapse's beginning hardly count."""

logger = logging.getLogger(__name__)


class AcceptanceMonitor:
    """Owns what is known about the draft's acceptance. ``count`` each chain that was verified, and ``end_step`` after
    each step that had any.

    is_trained: False where the weights are random, so that nothing can be expected of them
    is_proven: the head has shown that it works, so traffic that it never drafts well is merely hard
    revision: changes whenever the server should hear of it
    """

    def __init__(
        self,
        max_drafts: int,
        *,
        is_trained: bool = True,
        is_proven: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: DraftState = "unknown" if max_drafts else "off"
        self.complaint: str | None = None
        self.num_collapses = 0
        self.revision = 0
        self._max_drafts = max_drafts
        self._is_trained = is_trained
        self._is_proven = is_proven
        self._clock = clock
        self._logged_at = self._reported_at = clock()
        self._usual = 0.0
        self._num_chains = 0
        self._num_in_current = self._num_steps = 0
        self._current: dict[int, int] = {}
        self._generations: deque[dict[int, int]] = deque()
        self._totals: dict[int, int] = {}

    def count(self, extend: Extend, decision: Decision) -> None:
        """Take in one chain, of at least one draft."""
        seq = extend.seq
        bucket = bisect_left(PROMPT_LENGTHS, len(seq.request.input_ids))
        is_cached = 1 if seq.cached_tokens else 0
        key = bucket << 10 | is_cached << 9 | seq.is_chunked << 8 | extend.num_drafts << 4 | decision.num_accepted
        current = self._current
        current[key] = current.get(key, 0) + 1
        self._num_in_current += 1

    def end_step(self) -> None:
        """The chains of a step are counted."""
        self._num_steps += 1
        if self._num_in_current >= GENERATION and self._num_steps >= GENERATION_STEPS:
            self._turn()

    def windows(self) -> dict[str, Acceptance]:
        """Acceptance over the latest chains, by kind of traffic; kinds that did not occur are left out."""
        chains: dict[str, dict[int, int]] = {"all": {}}
        for counts in (self._totals, self._current):
            for key, count in counts.items():
                for traffic in _traffics(key):
                    of_traffic = chains.setdefault(traffic, {})
                    of_traffic[key & 0xFF] = of_traffic.get(key & 0xFF, 0) + count
        return {traffic: self._acceptance(counts) for traffic, counts in sorted(chains.items())}

    def _acceptance(self, counts: dict[int, int]) -> Acceptance:
        """counts: chains by drafted << 4 | accepted"""
        drafted, accepted = [0] * self._max_drafts, [0] * self._max_drafts
        for key, count in counts.items():
            for j in range(key >> 4):
                drafted[j] += count
            for j in range(key & 0xF):
                accepted[j] += count
        return Acceptance(num_chains=sum(counts.values()), drafted_per_position=drafted, accepted_per_position=accepted)

    def _turn(self) -> None:
        """A generation is full: move the windows on, and judge."""
        for key, count in self._current.items():
            self._totals[key] = self._totals.get(key, 0) + count
        self._generations.append(self._current)
        self._num_chains += self._num_in_current
        self._current, self._num_in_current, self._num_steps = {}, 0, 0
        if len(self._generations) > REPORT_GENERATIONS:
            for key, count in self._generations.popleft().items():
                self._totals[key] -= count
                if not self._totals[key]:
                    del self._totals[key]
        if self._is_trained and len(self._generations) >= ALARM_GENERATIONS:
            self._judge(*self._first_drafts())
        now = self._clock()
        if now - self._reported_at >= REPORT_EVERY:
            self.revision += 1
            self._reported_at = now
        if now - self._logged_at >= LOG_EVERY:
            logger.info("draft: %s", describe(self.windows()["all"]))
            self._logged_at = now

    def _first_drafts(self) -> tuple[float, int]:
        """Share of the alarm window's chains whose first draft was accepted, and their number."""
        window = [self._generations[-i].items() for i in range(1, ALARM_GENERATIONS + 1)]
        num_accepted = sum(count for of_one in window for key, count in of_one if key & 0xF)
        num_chains = sum(count for of_one in window for _, count in of_one)
        return num_accepted / num_chains, num_chains

    def _judge(self, rate: float, num_chains: int) -> None:
        if rate >= HEALTHY_RATE:
            self._usual += (_USUAL_MEMORY if self._usual else 1.0) * (rate - self._usual)
            if self.state != "healthy":
                self._become_healthy(rate)
        elif self.state == "healthy" and rate < COLLAPSED_SHARE * self._usual:
            self.num_collapses += 1
            self._complain(
                "collapsed",
                f"collapsed: the first draft was accepted in {rate:.0%} of the last {num_chains} drafted chains, in "
                f"{self._usual:.0%} before",
            )
        elif self.state == "unknown" and not self._is_proven and self._num_chains >= NEVER_HEALTHY_AFTER:
            self._complain(
                "never_healthy",
                f"never healthy: the first draft was accepted in {rate:.0%} of the last {num_chains} drafted chains "
                f"and never in {HEALTHY_RATE:.0%}, which a working head reaches",
            )

    def _become_healthy(self, rate: float) -> None:
        if self.complaint is not None:
            logger.warning("draft recovered: the first draft is accepted in %.0f %% of drafted chains", 100 * rate)
        self.state, self.complaint = "healthy", None
        self.revision += 1

    def _complain(self, state: DraftState, complaint: str) -> None:
        logger.error(
            "draft %s; answers stay right, and are slower; python -m nextn.doctor and a restart, whose canary "
            "tries the draft on text of its own, tell more",
            complaint,
        )
        self.state, self.complaint = state, complaint
        self.revision += 1


def describe(acceptance: Acceptance) -> str:
    """One line for a log."""
    rates = " ".join(f"{rate:.0%}" for rate in acceptance.rates)
    return (
        f"accept length {acceptance.accept_length:.2f} over {acceptance.num_chains} drafted chains, accepted by "
        f"position: {rates or '-'}"
    )


def _traffics(key: int) -> Iterator[str]:
    """The kinds of traffic that a chain belongs to."""
    yield "all"
    yield _BUCKETS[key >> 10]
    yield "cached" if key >> 9 & 1 else "not_cached"
    yield "chunked" if key >> 8 & 1 else "not_chunked"
