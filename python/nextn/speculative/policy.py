"""How many tokens to draft in the next step: as many as measurably pay, down to none.

A step that drafts k tokens yields 1 + Σ_{j ≤ k} a_1 ⋯ a_j tokens per sequence, where a_j is the chance that draft j is
accepted if the ones before it were. Both the a_j and what a step costs at this batch size and k are measured while
serving; the best k maximises tokens per second. Now and then another k is tried, so that neither goes stale: the
dearer the try, the rarer.

Steps also grow longer or shorter for reasons that have nothing to do with k: contexts grow, clocks change, a neighbour
computes. So a step's seconds are a pace times what is k's own. The pace follows every step of the k in use; and a k
that was timed long ago is judged at the pace of today, until a try tells what is its own today.

Under load most steps compute prompts beside the decoding sequences. What a prompt token takes is measured as well, and
taken off, so that such steps teach too.
"""

from __future__ import annotations

from itertools import accumulate
from math import exp, log
from operator import mul

PROMPT_MEMORY = 256
"""A step with this many prompt tokens counts half in what a prompt token takes."""

TRIES_AT_FIRST = 2
"""How often a k is timed before its time is trusted."""

REVIEW_EVERY = 8
"""Steps between two looks at the figures."""

PROBE_SHARE = 0.005
"""Share of the time that tries of another k may cost."""

MIN_PROBE_GAP, MAX_PROBE_GAP = 16, 2048
"""Steps between two tries, at least and at most."""

MAX_PROBE_TRIES = 8
"""Steps after which a try is given up that could not be timed, because not all sequences drafted alike."""

UNTIMED_REST = 64
"""Steps until a k whose tries could not be timed is tried again."""

PACE_MEMORY = 0.2
SPREAD_MEMORY = 0.05
RATE_MEMORY = 0.005
"""Weights of one new observation in the running means of the pace, of how far off steps are, and of an acceptance."""

RETURN_WEIGHT = 0.2
"""Weight of one new observation in what is a k's own, where it was not timed for a while: others have told the pace."""

MAX_STEPS_SEEN = 50
"""What is a k's own is the mean of so many steps, and from then on a running one."""

FIRST_SPREAD, MIN_SPREAD = 0.1, 0.02
MAX_SPREADS = 2.0
"""A step that is off by more than so many times what is usual was held up by something else, and counts as that;
unless the same k was off as much a while ago."""

FIRST_GUESS = 0.7
GUESS_WEIGHT = 4
"""A position's acceptance is guessed to be the previous one's; the guess counts as much as so many observations."""

MIN_GAIN = 1.03
"""Drafting must promise this much."""

UPKEEP_SHARE = 0.3
"""Where drafts are wanted prompt tokens get draft entries, which takes this share of a prompt token's time. Measured on
the embedded model of 5 layers, 33 µs without and 43 with; the more layers, the less."""

TRAFFIC_MEMORY = 0.01
"""Weight of one step in the prompt tokens per generated token."""

OUTLIER = 3.0
"""Prompts that take this many times as long as usual were held up by something else, and count as this at most."""


class DraftLengthPolicy:
    """Owns the measurements. ``choose`` before a step, ``observe`` after it."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._accepted = [0.0] * max_drafts
        self._num_seen = [0] * max_drafts
        self._costs: dict[tuple[int, bool], _StepCosts] = {}
        self._prompt_token_seconds = 0.0  # 0 is not known yet
        self._num_prompt_tokens = self._num_generated_tokens = 0.0  # of late
        self._steps_until_probe = MIN_PROBE_GAP
        self._num_probes = 0
        self._probing: int | None = None
        self._probe_tries = 0
        self._seconds_of_probe = 0.0

    @property
    def acceptance(self) -> list[float]:
        """The chance of each draft to be accepted if the ones before it were."""
        chances = [FIRST_GUESS]
        for rate, num_seen in zip(self._accepted, self._num_seen, strict=True):
            chances.append((num_seen * rate + GUESS_WEIGHT * chances[-1]) / (num_seen + GUESS_WEIGHT))
        return chances[1:]

    def choose(self, num_seqs: int, *, has_fixed: bool = False, will_be_timed: bool = True) -> int:
        """The number of drafts for a step of ``num_seqs`` ≥ 1 decoding sequences.

        has_fixed: whether some of them draft a number of their own, whatever this one is
        will_be_timed: whether ``observe`` will hear of it, so that something can be tried
        """
        costs = self._costs_at(num_seqs, has_fixed)
        self._steps_until_probe -= will_be_timed
        if costs.steps_until_review > 0:
            costs.steps_until_review -= 1
            return costs.chosen
        best = self.best(num_seqs, has_fixed=has_fixed)
        # Where nothing is known, everything is tried; where a similar batch is, none at all and what looks best.
        if not will_be_timed:
            return best
        if self._probing is not None:
            self._probe_tries -= 1
            if self._probe_tries > 0:
                return self._probing
            self._probing, self._steps_until_probe = None, MAX_PROBE_GAP
        untried = [k for k in ((0, best) if costs.guess else range(self.max_drafts, -1, -1)) if not costs.trusts(k)]
        if untried and costs.untimed < MAX_PROBE_TRIES:
            costs.untimed += 1
            return min(untried, key=lambda k: costs.num_seen[k])  # in turn: what holds one up has then passed
        if untried:
            costs.untimed, costs.chosen, costs.steps_until_review = 0, best, UNTIMED_REST
            return best
        if self._steps_until_probe <= 0:
            return self._probe(best)
        costs.chosen, costs.steps_until_review = best, REVIEW_EVERY - 1
        return best

    def best(self, num_seqs: int, *, has_fixed: bool = False) -> int:
        """The k with the most expected tokens per second, as far as known; none, if drafting hardly gains."""
        costs, yields = self._costs_at(num_seqs, has_fixed), self._expected_tokens()
        upkeep = UPKEEP_SHARE * self._prompt_token_seconds * self._prompts_per_token * num_seqs
        seconds = costs.estimates()
        speeds = [tokens / (seconds[k] + (tokens * upkeep if k else 0)) for k, tokens in enumerate(yields)]
        speeds[0] *= MIN_GAIN
        return speeds.index(max(speeds))

    def observe(
        self, num_seqs: int, num_drafts: int, seconds: float, num_prompt_tokens: int = 0, *, has_fixed: bool = False
    ) -> None:
        """Record what a step took.

        num_seqs: decoding sequences; may be 0 beside prompts
        num_drafts: tokens that all of them drafted, but those that draft a number of their own (has_fixed)
        num_prompt_tokens: of prompts, computed in the same step
        """
        of_prompts = num_prompt_tokens * self._prompt_token_seconds
        if num_seqs == 0:
            self._update_prompt(seconds, num_prompt_tokens)
            return
        costs = self._costs_at(num_seqs, has_fixed)
        of_decoding = seconds
        if num_prompt_tokens:
            if costs.trusts(num_drafts):
                # Both are known about: each takes its share of what was not foreseen.
                foreseen = of_prompts + costs.estimate(num_drafts)
                of_decoding = costs.estimate(num_drafts) * seconds / foreseen
                self._update_prompt(max(seconds - costs.estimate(num_drafts), 0.0), num_prompt_tokens)
            elif 0.0 < of_prompts < seconds / 2:
                of_decoding -= of_prompts
            else:
                return  # what is left for the decoding sequences would be mostly noise
        costs.update(num_drafts, of_decoding)
        if num_drafts == self._probing:
            self._end_probe(num_seqs, of_decoding, has_fixed)

    def observe_traffic(self, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        """Record what a step computed of prompts, and what it generated."""
        self._num_prompt_tokens += num_prompt_tokens - TRAFFIC_MEMORY * self._num_prompt_tokens
        self._num_generated_tokens += num_generated_tokens - TRAFFIC_MEMORY * self._num_generated_tokens

    def observe_catching_up(
        self, num_seqs: int, seconds: float, num_prompt_tokens: int = 0, *, has_fixed: bool = False
    ) -> None:
        """Record a step that made the draft layer ready to draft, for some sequences at least; see ``observe``."""
        if self._probing is not None:
            usual = self._costs_at(num_seqs, has_fixed).estimate(0) + num_prompt_tokens * self._prompt_token_seconds
            self._seconds_of_probe += max(seconds - usual, 0.0)

    def observe_acceptance(self, drafted: int, accepted: int) -> None:
        """Record a verified chain."""
        for j in range(min(accepted + 1, drafted, self.max_drafts)):
            self._num_seen[j] += 1
            weight = max(RATE_MEMORY, 1 / self._num_seen[j])
            self._accepted[j] += weight * ((j < accepted) - self._accepted[j])

    @property
    def _prompts_per_token(self) -> float:
        return self._num_prompt_tokens / self._num_generated_tokens if self._num_generated_tokens else 0.0

    def _update_prompt(self, seconds: float, num_tokens: int) -> None:
        """Many tokens say more than few, whose time is mostly that of starting."""
        known = self._prompt_token_seconds
        found = min(seconds / num_tokens, OUTLIER * known) if known else seconds / num_tokens
        weight = num_tokens / (num_tokens + PROMPT_MEMORY) if known else 1.0
        self._prompt_token_seconds += weight * (found - known)

    def _probe(self, best: int) -> int:
        """Another k, until a step with it has been timed: none at all, or a neighbour of the best."""
        self._num_probes += 1
        others = [k for k in (best + 1, best - 1, 0) if 0 <= k <= self.max_drafts and k != best]
        self._probing = others[self._num_probes % len(others)]
        self._probe_tries = MAX_PROBE_TRIES
        self._seconds_of_probe = 0.0
        return self._probing

    def _end_probe(self, num_seqs: int, seconds: float, has_fixed: bool) -> None:
        """What the probe lost sets when the next may come."""
        assert self._probing is not None, "there is a probe to end"
        best, yields = self.best(num_seqs, has_fixed=has_fixed), self._expected_tokens()
        usual = self._costs_at(num_seqs, has_fixed).estimate(best)
        lost = (self._seconds_of_probe + seconds) / usual - yields[self._probing] / yields[best]
        self._steps_until_probe = max(MIN_PROBE_GAP, min(MAX_PROBE_GAP, int(lost / PROBE_SHARE)))
        self._probing = None

    def _expected_tokens(self) -> list[float]:
        """Per sequence, of a step that drafts 0, 1, … tokens."""
        return list(accumulate(accumulate(self.acceptance, mul, initial=1.0)))

    def _costs_at(self, num_seqs: int, has_fixed: bool) -> _StepCosts:
        """Similar batch sizes share their measurements: 1, 2, 3, 4, 5 … 6, 7 … 8, 9 … 12, 13 … 16, …"""
        octave = (num_seqs - 1).bit_length()
        bucket = 2 * octave + (4 * num_seqs > 3 << octave)
        if (bucket, has_fixed) not in self._costs:
            known = [other for other, costs in self._costs.items() if costs.is_complete]
            nearest = min(known, key=lambda other: (other[1] != has_fixed, abs(other[0] - bucket)), default=None)
            guess = None if nearest is None else self._costs[nearest]
            self._costs[bucket, has_fixed] = _StepCosts(self.max_drafts, guess)
        return self._costs[bucket, has_fixed]


class _StepCosts:
    """What steps take by number of drafts, at one batch size.

    guess: those of a similar batch, or None; scaled by the nearest k measured here, they stand in for what was not
        measured
    untimed: tries of late that were not timed
    chosen, steps_until_review: what the next steps do without another look
    """

    def __init__(self, max_drafts: int, guess: _StepCosts | None) -> None:
        self.guess = guess
        self.untimed = 0
        self.num_seen = [0] * (max_drafts + 1)
        self.chosen = 0
        self.steps_until_review = 0
        # Logarithms: of the pace, of what is each k's own, and the mean distance of a step from their sum.
        self._pace = 0.0
        self._own = [0.0] * (max_drafts + 1)
        self._spread = FIRST_SPREAD
        # Of each k the latest step, counted, and how far off the latest one was that came after others.
        self._num_steps = 0
        self._timed_at = [0] * (max_drafts + 1)
        self._returned_off = [0.0] * (max_drafts + 1)

    @property
    def is_complete(self) -> bool:
        """Whether every k has an estimate."""
        return self.guess is not None or all(self.num_seen)

    def trusts(self, k: int) -> bool:
        return self.num_seen[k] >= TRIES_AT_FIRST

    def estimate(self, k: int) -> float:
        """Seconds of a step with k drafts; infinite if there is nothing to go by."""
        return exp(self._pace + self._own[k]) if self.num_seen[k] else self.estimates()[k]

    def estimates(self) -> list[float]:
        """``estimate`` of every k."""
        measured = {k: exp(self._pace + self._own[k]) for k, num_seen in enumerate(self.num_seen) if num_seen}
        if self.guess is None:
            return [measured.get(k, float("inf")) for k in range(len(self.num_seen))]
        guess = self.guess.estimates()
        ratios = {k: seconds / guess[k] for k, seconds in measured.items()} or {0: 1.0}
        return [seconds * ratios[min(ratios, key=lambda other: abs(other - k))] for k, seconds in enumerate(guess)]

    def update(self, k: int, seconds: float) -> None:
        self.untimed = 0
        self.num_seen[k] += 1
        self._num_steps += 1
        num_others, self._timed_at[k] = self._num_steps - self._timed_at[k] - 1, self._num_steps
        off = log(seconds) - self._pace - self._own[k]
        if self.num_seen[k] <= TRIES_AT_FIRST:
            # The first tries warm caches up: the fastest says most.
            self._own[k] += off if self.num_seen[k] == 1 else min(off, 0.0)
            return
        share, most = 1 / min(self.num_seen[k], MAX_STEPS_SEEN), MAX_SPREADS * self._spread
        if num_others >= MIN_PROBE_GAP:
            before, self._returned_off[k] = self._returned_off[k], off
            most = max(most, abs(before)) if before * off > 0 else most
            self._own[k] += max(share, RETURN_WEIGHT) * max(-most, min(off, most))
            return
        # What a k does not know of itself yet is its own; of one that is known, what changes is the pace.
        off = max(-most, min(off, most))
        self._spread = max(MIN_SPREAD, self._spread + SPREAD_MEMORY * (abs(off) - self._spread))
        self._own[k] += share * off
        self._pace += PACE_MEMORY * (1 - share) * off
