"""What the engine has done since it became ready."""

from __future__ import annotations

from nextn.scheduler.scheduler import Decision, Extend


class Counters:
    """Totals since start. A verify pass counts for speculation only if it had drafts to verify."""

    def __init__(self, num_drafts: int) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.num_steps = 0
        self.num_aborted = 0
        self.num_finished = 0
        self.num_verify_passes = 0
        self.drafted = [0] * num_drafts
        self.accepted = [0] * num_drafts

    def count(self, extend: Extend, decision: Decision, kept: list[int], *, is_first: bool) -> None:
        seq = extend.seq
        if is_first and kept:
            self.prompt_tokens += seq.num_prompt
            self.cached_tokens += seq.cached_tokens or 0
        self.generation_tokens += len(kept)
        self.num_finished += seq.finish_reason is not None
        if extend.num_drafts:
            self.num_verify_passes += 1
            num_accepted = min(decision.num_accepted, len(kept))
            for j in range(extend.num_drafts):
                self.drafted[j] += 1
                self.accepted[j] += j < num_accepted
