"""The shadow check: some finished requests are scored again without speculation, and must have come out the same.

A wrong draft costs speed; a wrong verify pass, a stale KV entry or a wrong prefix from the cache changes what is said,
and nothing else would tell. So the target alone recomputes prompt and output from the first token on, in pages of its
own, and each emitted token is held against what the target's logits say at its place, after the request's bias,
penalties and minimum length:

- greedy: the token must be the likeliest one. This is exact, up to ties.
- sampled: the token must be one that temperature, top-k, top-p and min-p leave possible. Which of those is drawn
  depends on where drafts stood, so the draw itself is not repeated: with none of the three truncations every token is
  possible and the check says nothing.

It works in slices, after a step's outputs have left: at any time while nothing runs, and else so rarely that it takes a
hundredth of the engine's time. It gives its pages back when requests could need them, and starts over later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import msgspec
import torch

from nextn.kernels.sampling_probs import sampling_probs
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.protocol.draft_health import ShadowCounts
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.sequence import Sequence
from nextn.speculative.leader import Leader
from nextn.speculative.logits import LogitAdjuster, Row

SLICE = 64
"""Tokens computed between two steps of the engine. A request that arrives waits for one slice at most."""

BUSY_SHARE = 0.01
"""Share of the time that slices may take while requests run."""

MAX_WAITING = 32
"""Finished requests that wait for their check; more are left out, and counted."""

TIE = {torch.float32: 0.02, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Two logits this close, by computing type, are a tie: a batch of another shape may order them differently. With the
compiled CPU kernels a token has the same result in any batch, and 5,522 greedy tokens of the embedded model no gap."""

LOOSE_TOP_P, LOOSE_MIN_P = 1e-3, 0.99
"""Rounding may move the edge of top-p (added) and of min-p (factor) by this much."""

MAX_LINES_PER_MINUTE = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Disagreement:
    """position: index in the output; gap: how far the emitted token's logit lies below the least that was allowed"""

    position: int
    emitted: int
    expected: int
    gap: float


@dataclass
class _Check:
    """One request under way. ``seq`` holds the prompt, and the pages; rows before ``num_done`` have been computed."""

    seq: Sequence
    output: list[int]
    num_done: int = 0
    found: list[_Disagreement] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Tokens to compute: the last one's successor was never decided."""
        return self.seq.num_prompt + len(self.output) - 1


class ShadowCheck:
    """Owns the requests that wait for their check, and what the checks found.

    rate: share of finished requests to check, chosen by a hash of their name and number
    leader: tells the other ranks, which compute the same
    """

    def __init__(
        self,
        target: Glm4MoeForCausalLM,
        kv_cache: KVCache,
        pages: KVPages,
        rate: float,
        leader: Leader,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = ShadowCounts()
        self._target = target
        self._kv_cache = kv_cache
        self._pages = pages
        self._rate = rate
        self._leader = leader
        self._adjuster = LogitAdjuster()
        self._clock = clock
        self._device = kv_cache.k.device
        self._tie = TIE[target.dtype]
        self._waiting: deque[_Check] = deque()
        self._num_offered = 0
        self._next_slice_at = 0.0
        self._lines_since = clock()
        self._num_lines = 0

    @property
    def num_pages_held(self) -> int:
        return len(self._waiting[0].seq.pages) if self._waiting else 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def offer(self, seq: Sequence) -> None:
        """Consider a request that has just finished."""
        if len(seq.tokens) == seq.num_prompt:
            return
        self._num_offered += 1
        if crc32(f"{self._num_offered}:{seq.request.rid}".encode()) >= self._rate * 2**32:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.counts = msgspec.structs.replace(self.counts, num_skipped=self.counts.num_skipped + 1)
            return
        again = Sequence(
            request=seq.request,
            arrival=seq.arrival,
            arrival_time=seq.arrival_time,
            max_new_tokens=seq.max_new_tokens,
            stop_ids=seq.stop_ids,
        )
        self._waiting.append(_Check(again, seq.tokens[seq.num_prompt :]))

    def make_way(self, num_pages: int) -> None:
        """Give the pages back if fewer than ``num_pages`` are to be had."""
        if self._waiting and self._waiting[0].seq.pages and self._pages.num_available < num_pages:
            self._drop_progress(self._waiting[0])

    def run(self, *, is_idle: bool) -> None:
        """Compute a slice, if there is one and it is time for it."""
        if not self._waiting or (not is_idle and self._clock() < self._next_slice_at):
            return
        check = self._waiting[0]
        missing = self._pages.pages_for(check.num_rows) - len(check.seq.pages)
        if not is_idle and self._pages.num_available - missing < self._pages.num_pages // 4:
            return
        if not self._pages.grow(check.seq, check.num_rows):
            return
        started = self._clock()
        self._run_slice(check)
        now = self._clock()
        self._next_slice_at = now + (now - started) / BUSY_SHARE
        if check.num_done == check.num_rows:
            self._waiting.popleft()
            self._pages.release(check.seq)
            self._conclude(check)

    def _drop_progress(self, check: _Check) -> None:
        self._pages.release(check.seq)
        check.num_done = 0
        check.found.clear()

    def _conclude(self, check: _Check) -> None:
        self.counts = msgspec.structs.replace(
            self.counts,
            num_requests=self.counts.num_requests + 1,
            num_tokens=self.counts.num_tokens + len(check.output),
            num_disagreements=self.counts.num_disagreements + len(check.found),
        )
        if not check.found or not self._may_log():
            return
        first = check.found[0]
        logger.error(
            "shadow check: request %s, output position %d: emitted token %d, without speculation %s %d (gap %.3g, "
            "a tie is %.3g at most); %d of %d tokens disagree: what was said is wrong",
            check.seq.request.rid,
            first.position,
            first.emitted,
            "it is" if check.seq.request.sampling.is_greedy else "it would have been at least as likely as",
            first.expected,
            first.gap,
            self._tie,
            len(check.found),
            len(check.output),
        )

    def _may_log(self) -> bool:
        """At most MAX_LINES_PER_MINUTE; the counts have the rest."""
        now = self._clock()
        if now - self._lines_since >= 60:
            self._lines_since, self._num_lines = now, 0
        self._num_lines += 1
        return self._num_lines <= MAX_LINES_PER_MINUTE

    @torch.inference_mode()
    def _run_slice(self, check: _Check) -> None:
        start, num_prompt = check.num_done, check.seq.num_prompt
        end = min(start + SLICE, check.num_rows)
        ids = [*check.seq.tokens, *check.output][start:end]
        first = max(start, num_prompt - 1)
        self._leader.score(start, ids, check.seq.pages, first - start)
        batch = make_extend_batch([(start, end - start)], [check.seq.pages], self._pages.page_size, self._device)
        hidden = self._target.forward(torch.tensor(ids, device=self._device), batch, self._kv_cache)
        if first < end:
            logits = self._target.compute_logits(hidden[first - start :])
            places = range(first + 1 - num_prompt, end + 1 - num_prompt)
            self._compare(check, logits, places)
        check.num_done = end

    def _compare(self, check: _Check, logits: torch.Tensor, places: range) -> None:
        """Hold the output's tokens at ``places`` against the logits they came from, [len(places), V]."""
        rows = [Row(check.seq, check.output[:place]) for place in places]
        logits = self._adjuster.adjust(logits, rows)
        emitted = torch.tensor([check.output[place] for place in places], device=self._device)
        if check.seq.request.sampling.is_greedy:
            least, expected = logits.max(-1)
        else:
            least, expected = _least_possible(logits, check.seq.request.sampling)
        gaps = least - logits.gather(1, emitted[:, None])[:, 0]
        for row in (gaps > self._tie).nonzero()[:, 0].tolist():
            check.found.append(_Disagreement(places[row], int(emitted[row]), int(expected[row]), float(gaps[row])))


def _least_possible(logits: torch.Tensor, sampling: TokenSampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest logit [R] that may be drawn, and its token [R]; what rounding could let in counts as possible.

    logits: [R, V] float32, adjusted
    """
    num_rows = logits.shape[0]

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=logits.device)

    probs = sampling_probs(
        logits,
        column(sampling.temperature, torch.float32),
        column(sampling.top_k, torch.int64) if sampling.top_k else None,
        column(min(sampling.top_p + LOOSE_TOP_P, 1.0), torch.float32) if sampling.top_p < 1 else None,
        column(sampling.min_p * LOOSE_MIN_P, torch.float32) if sampling.min_p else None,
    )
    return logits.masked_fill(probs == 0, float("inf")).min(-1)
