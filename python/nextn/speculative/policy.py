"""How many tokens to draft in the next step: as many as measurably pay, down to none.

A step that drafts k tokens yields 1 + Σ_{j ≤ k} a_1 ⋯ a_j tokens per sequence, where a_j is the chance that draft j is
accepted if the ones before it were. Both the a_j and what a step costs at this batch size and k are measured while
serving; the best k maximises tokens per second. Now and then another k is tried, so that neither goes stale.
"""

from __future__ import annotations

from collections.abc import Iterable

PROBE_EVERY = 32
"""Steps between two tries of another k: even one twice as slow then costs about 3 % of the time at most."""

TRIES_AT_FIRST = 2
"""How often every k is timed at a batch size not met before."""

COST_MEMORY = 0.2
RATE_MEMORY = 0.02
"""Weights of one new observation in the running means of a step's seconds and of an acceptance."""

OUTLIER = 3.0
"""A step this many times as long as usual was held up by something else; its length counts as this at most."""


class DraftLengthPolicy:
    """Owns the measurements. ``choose`` before a step, ``observe`` after it."""

    def __init__(self, max_drafts: int, first_guess: float = 0.7) -> None:
        self.max_drafts = max_drafts
        self.acceptance = [first_guess] * max_drafts
        self._costs: dict[int, list[_Cost]] = {}
        self._steps_until_probe = PROBE_EVERY
        self._num_probes = 0

    def choose(self, num_seqs: int) -> int:
        """The number of drafts for a step of ``num_seqs`` ≥ 1 decoding sequences."""
        costs = self._costs_at(num_seqs)
        untried = [k for k, cost in enumerate(costs) if cost.num_seen < TRIES_AT_FIRST]
        if untried:
            return untried[-1]
        best = self.best(num_seqs)
        self._steps_until_probe -= 1
        if self._steps_until_probe > 0:
            return best
        self._steps_until_probe = PROBE_EVERY
        self._num_probes += 1
        neighbours = [k for k in (best + 1, best - 1) if 0 <= k <= self.max_drafts]
        return neighbours[self._num_probes % len(neighbours)]

    def best(self, num_seqs: int) -> int:
        """The k with the most expected tokens per second, as far as measured; ties go to fewer drafts."""
        costs = self._costs_at(num_seqs)
        best, best_speed, tokens, survival = 0, 0.0, 1.0, 1.0
        for k, cost in enumerate(costs):
            if k:
                survival *= self.acceptance[k - 1]
                tokens += survival
            speed = tokens / cost.seconds if cost.seconds else 0.0
            if speed > best_speed:
                best, best_speed = k, speed
        return best

    def observe(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """Record what a step of decoding sequences took that all drafted ``num_drafts`` tokens."""
        self._costs_at(num_seqs)[num_drafts].update(seconds)

    def observe_acceptance(self, outcomes: Iterable[tuple[int, int]]) -> None:
        """outcomes: (drafted, accepted) of each verified chain."""
        for drafted, accepted in outcomes:
            for j in range(min(accepted + 1, drafted, self.max_drafts)):
                self.acceptance[j] += RATE_MEMORY * ((j < accepted) - self.acceptance[j])

    def _costs_at(self, num_seqs: int) -> list[_Cost]:
        """Batch sizes share their measurements between powers of two."""
        return self._costs.setdefault((num_seqs - 1).bit_length(), [_Cost() for _ in range(self.max_drafts + 1)])


class _Cost:
    """A running mean of a step's seconds; 0 before the first."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_seen = 0

    def update(self, seconds: float) -> None:
        self.num_seen += 1
        if self.num_seen <= TRIES_AT_FIRST:
            # The first tries warm caches up: the fastest says most.
            self.seconds = min(self.seconds, seconds) if self.seconds else seconds
        else:
            self.seconds += COST_MEMORY * (min(seconds, OUTLIER * self.seconds) - self.seconds)
