"""How well the draft does, as the engine tells the server whenever that has changed."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

DraftState = Literal["off", "unknown", "healthy", "collapsed", "never_healthy"]


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """What became of drafted chains.

    drafted_per_position, accepted_per_position: index j counts draft j + 1 of a chain; their quotient is the position's
        acceptance rate
    """

    num_chains: int
    drafted_per_position: list[int]
    accepted_per_position: list[int]

    @property
    def accept_length(self) -> float:
        """Tokens per verify pass that had drafts, the model's own token included; 0 before the first."""
        return 1 + sum(self.accepted_per_position) / self.num_chains if self.num_chains else 0.0

    @property
    def rates(self) -> list[float]:
        """Acceptance rate of each position that was drafted."""
        return [a / d for d, a in zip(self.drafted_per_position, self.accepted_per_position, strict=True) if d]


class CanaryResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the canary said at start. ``message`` is for the operator, whatever the verdict."""

    verdict: Literal["healthy", "sick", "skipped"]
    message: str
    acceptance: Acceptance | None = None
    seconds: float = 0.0


class ShadowCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Finished requests scored again without speculation, since start.

    num_disagreements: tokens that came out otherwise, ties left aside
    num_skipped: requests that were chosen and not checked, for want of time
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_disagreements: int = 0
    num_skipped: int = 0

    @property
    def complaint(self) -> str | None:
        if not self.num_disagreements:
            return None
        return (
            f"wrong output: {self.num_disagreements} of {self.num_tokens} tokens that were checked without speculation "
            "came out otherwise"
        )


class DraftHealth(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What monitor, canary and shadow check have found.

    complaint: what is wrong, in one line; None if nothing is known to be
    shadow: None where nothing is checked
    windows: acceptance over the latest drafted chains, by kind of traffic; "all" is always among them
    """

    state: DraftState
    complaint: str | None
    num_collapses: int
    windows: dict[str, Acceptance]
    canary: CanaryResult
    shadow: ShadowCounts | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with what can be derived beside them."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        del plain["type"]
        for traffic, window in self.windows.items():
            plain["windows"][traffic] |= {"accept_length": window.accept_length, "rates": window.rates}
        return plain
