"""One request's tokens and how far they have been computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from nextn.protocol.messages import AddRequest, FinishReason, TokenLogprobs
from nextn.scheduler.prefix_cache import CacheNode


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """The state of one request. The scheduler owns it; nothing else changes it.

    tokens: prompt, then output
    num_computed: the KV of tokens[:num_computed] is in the cache, in all of the target's layers
    num_draft_computed: the same of the draft's layer; without a draft, num_computed
    pages: the KV pages of the sequence, in order; the first len(nodes) belong to the prefix cache
    is_chunked: the prompt took more than one step
    slot: index of per-sequence device state while running, else -1
    """

    request: AddRequest
    arrival: int
    arrival_time: float
    max_new_tokens: int
    stop_ids: frozenset[int]
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    num_draft_computed: int = 0
    pages: list[int] = field(default_factory=list)
    nodes: list[CacheNode] = field(default_factory=list)
    status: Status = Status.WAITING
    slot: int = -1
    cached_tokens: int | None = None
    is_chunked: bool = False
    first_scheduled_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_verify_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.input_ids)
        if self.request.prompt_logprobs_start is not None:
            self.prompt_logprobs = []

    @property
    def num_prompt(self) -> int:
        return len(self.request.input_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.input_ids)

    @property
    def compute_target(self) -> int:
        """How many tokens to compute before the sequence decides a token.

        A fresh prompt is computed whole, and its last row decides the first token. A sequence that was preempted is
        computed up to its last token, which puts it back into exactly the state it left: ready to draft.
        """
        return len(self.tokens) if self.num_output == 0 else len(self.tokens) - 1

    @property
    def is_decoding(self) -> bool:
        return self.num_output > 0 and self.num_computed == len(self.tokens) - 1

    @property
    def needs_fixed_drafts(self) -> bool:
        """Which tokens a seed draws depends on where drafts stood; greedy output does not."""
        sampling = self.request.sampling
        return sampling.has_own_seed and not sampling.is_greedy

    def append(self, new_tokens: list[int]) -> list[int]:
        """Append decided tokens up to the first that ends the request; set ``finish_reason`` if one does.

        Returns the tokens that were kept; the token that stops the request is one of them.
        """
        sampling = self.request.sampling
        kept: list[int] = []
        for token in new_tokens:
            self.tokens.append(token)
            kept.append(token)
            if token in self.stop_ids and self.num_output > sampling.min_new_tokens:
                self.finish_reason, self.stop_token_id = "stop", token
                break
            if self.num_output >= self.max_new_tokens:
                self.finish_reason = "length"
                break
        return kept
