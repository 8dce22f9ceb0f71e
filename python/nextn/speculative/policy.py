"""How many tokens to draft in the next step: as many as measurably pay, down to none.

A step that drafts k tokens yields 1 + Σ_{j ≤ k} a_1 ⋯ a_j tokens per sequence, where a_j is the chance that draft j is
accepted if the ones before it were. Both the a_j and what a step costs at this batch size and k are measured while
serving; the best k maximises tokens per second. Now and then another k is tried, so that neither goes stale: the
dearer the try, the rarer.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from operator import mul

PROBE_SHARE = 0.01
"""Share of the time that tries of another k may cost."""

MIN_PROBE_GAP, MAX_PROBE_GAP = 16, 512
"""Steps between two tries, at least and at most."""

TRIES_AT_FIRST = 2
"""How often every k is timed at a batch size not met before."""

COST_MEMORY = 0.2
RATE_MEMORY = 0.005
"""Weights of one new observation in the running means of a step's seconds and of an acceptance."""

GUESS_WEIGHT = 4
"""As many observations as this count as much as the first guess of an acceptance."""

OUTLIER = 3.0
"""A step this many times as long as usual was held up by something else; its length counts as this at most."""


class DraftLengthPolicy:
    """Owns the measurements. ``choose`` before a step, ``observe`` after it."""

    def __init__(self, max_drafts: int, first_guess: float = 0.7) -> None:
        self.max_drafts = max_drafts
        self.acceptance = [first_guess] * max_drafts
        self._num_seen = [GUESS_WEIGHT] * max_drafts
        self._costs: dict[int, list[_Cost]] = {}
        self._steps_until_probe = MIN_PROBE_GAP
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
        self._num_probes += 1
        neighbours = [k for k in (best + 1, best - 1) if 0 <= k <= self.max_drafts]
        probe = neighbours[self._num_probes % len(neighbours)]
        yields = self._expected_tokens()
        lost = costs[probe].seconds - costs[best].seconds * yields[probe] / yields[best]
        gap = lost / (PROBE_SHARE * costs[best].seconds)
        self._steps_until_probe = max(MIN_PROBE_GAP, min(MAX_PROBE_GAP, int(gap)))
        return probe

    def best(self, num_seqs: int) -> int:
        """The k with the most expected tokens per second, as far as measured; ties go to fewer drafts."""
        costs, yields = self._costs_at(num_seqs), self._expected_tokens()
        return max(range(len(costs)), key=lambda k: yields[k] / costs[k].seconds if costs[k].seconds else 0.0)

    def _expected_tokens(self) -> list[float]:
        """Per sequence, of a step that drafts 0, 1, … tokens."""
        return list(accumulate(accumulate(self.acceptance, mul, initial=1.0)))

    def observe(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """Record what a step of decoding sequences took that all drafted ``num_drafts`` tokens."""
        self._costs_at(num_seqs)[num_drafts].update(seconds)

    def observe_acceptance(self, outcomes: Iterable[tuple[int, int]]) -> None:
        """outcomes: (drafted, accepted) of each verified chain."""
        for drafted, accepted in outcomes:
            for j in range(min(accepted + 1, drafted, self.max_drafts)):
                self._num_seen[j] += 1
                weight = max(RATE_MEMORY, 1 / self._num_seen[j])
                self.acceptance[j] += weight * ((j < accepted) - self.acceptance[j])

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
