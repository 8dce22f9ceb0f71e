"""The message types that cross the socket between the server process and the engine process.

``ToEngine`` flows one way, ``FromEngine`` the other. All are msgspec structs, encoded as tagged msgpack.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from nextn.protocol.draft_health import DraftHealth
from nextn.protocol.sampling import TokenSampling

FinishReason = Literal["stop", "length", "abort", "error"]


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Generate from ``input_ids``.

    priority: larger runs earlier under ``--schedule-policy priority``; ties go by arrival
    cache_salt: requests share cached prefixes only with requests of the same salt
    num_top_logprobs: None returns no logprobs; n ≥ 0 returns the chosen token's and the n most likely
    prompt_logprobs_start: None, or the first prompt position whose logprob is wanted (position 0 has none)
    grammar: what the output must follow, in the language of llguidance; None for nothing
    """

    rid: str
    input_ids: list[int]
    sampling: TokenSampling
    priority: int = 0
    cache_salt: str = ""
    num_top_logprobs: int | None = None
    prompt_logprobs_start: int | None = None
    grammar: str | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request now. An unknown rid is ignored: it may have finished meanwhile. ``rid=None`` aborts all."""

    rid: str | None


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Drop every cached prefix that no request uses."""

    call_id: str


class GetInfo(msgspec.Struct, frozen=True, tag=True):
    """Ask for the engine's state (``/get_server_info``)."""

    call_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Abort what runs and leave the loop."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability (natural log, of the model's unmodified distribution) of one token and its likeliest rivals."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = []


class SpecStep(msgspec.Struct, frozen=True, array_like=True):
    """How one step of the engine came to its tokens, for one request: ``[num_drafted, num_accepted, num_tokens]``.

    The first ``num_accepted`` of the ``num_tokens`` were drafted; what follows, one token or none where the request
    ended, is the model's own.
    """

    num_drafted: int
    num_accepted: int
    num_tokens: int


def first_steps(steps: list[SpecStep], num_tokens: int) -> list[SpecStep]:
    """What made the first ``num_tokens`` tokens; the last step is cut where they end."""
    found: list[SpecStep] = []
    for step in steps:
        if num_tokens <= 0:
            break
        if step.num_tokens > num_tokens:
            step = SpecStep(step.num_drafted, min(step.num_accepted, num_tokens), num_tokens)
        found.append(step)
        num_tokens -= step.num_tokens
    return found


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step produced for one request. Counts are totals since the request began.

    token_ids: the new tokens of this step; a stop token that ended the request is included
    spec_steps: how they came about: one entry per step; together they have as many tokens as ``token_ids``
    finish_reason: None while it runs; exactly one output per request carries a reason, and it is the last
    stop_token_id: which token ended it, when finish_reason is "stop"
    error: why, when finish_reason is "error" or "abort"
    error_kind: "queue_full" | "unavailable" | "invalid" | "internal" when finish_reason is "error"
    spec_verify_ct: target forwards that produced output tokens
    num_drafted, num_accepted: draft tokens proposed and accepted so far
    """

    rid: str
    token_ids: list[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_kind: str | None = None
    spec_verify_ct: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    spec_steps: list[SpecStep] = []
    queue_time: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges now and counters since start, for ``/metrics`` and ``/get_server_info``.

    drafted_per_position, accepted_per_position: index j counts draft j + 1 of a step
    """

    num_running: int = 0
    num_queued: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_cached_pages: int = 0
    page_size: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_aborted: int = 0
    num_finished: int = 0
    num_verify_passes: int = 0
    drafted_per_position: list[int] = []
    accepted_per_position: list[int] = []

    @property
    def accept_length(self) -> float:
        """(accepted drafts + verify passes) / verify passes; 0 before the first pass."""
        return 1 + sum(self.accepted_per_position) / self.num_verify_passes if self.num_verify_passes else 0.0


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """Everything one engine step has to say."""

    outputs: list[RequestOutput]
    stats: EngineStats


class CallReply(msgspec.Struct, frozen=True, tag=True):
    """Answer to FlushCache (``{"flushed_pages": int}``) or GetInfo (plain JSON-able values)."""

    call_id: str
    result: dict[str, Any]


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine has loaded its model and takes requests."""

    model: dict[str, Any]
    max_total_tokens: int
    context_length: int
    vocab_size: int
    eos_token_ids: list[int]
    load_seconds: float


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start, or cannot go on. ``user_error`` means that the message alone tells what to change."""

    message: str
    user_error: bool = False


ToEngine = AddRequest | Abort | FlushCache | GetInfo | Shutdown
FromEngine = StepOutput | DraftHealth | CallReply | EngineReady | EngineFailed
