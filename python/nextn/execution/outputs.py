"""What the engine says about a request: its outputs, and why it is refused."""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from nextn.errors import RequestError
from nextn.protocol.messages import AddRequest, RequestOutput, SpecStep, TokenLogprobs
from nextn.scheduler.sequence import Sequence

LARGEST = 10**6
"""Of what changes logits: float32 rounds a logit beyond it so much that nothing is left of what the model said.
What divides them is at least its reciprocal: much less makes them infinite."""


class _Range(NamedTuple):
    """Numbers from ``low`` to ``high``, both included; ``low`` itself is not where it is open."""

    low: float
    high: float
    is_open: bool = False

    def check(self, name: str, found: float) -> None:
        """Raises RequestError if a parameter lies outside, or is no number."""
        if not self.low <= found <= self.high or (self.is_open and found == self.low):
            at_least = "more than" if self.is_open else "at least"
            expected = f"{at_least} {self.low} and at most {self.high}"
            raise RequestError(f"{name}: found {found}, expected {expected}", name)


_RANGES = {
    "max_new_tokens": _Range(1, 2**31 - 1),
    "temperature": _Range(0, LARGEST),
    "top_k": _Range(0, 2**31 - 1),
    "top_p": _Range(0, 1, is_open=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(1 / LARGEST, LARGEST),
    "presence_penalty": _Range(-LARGEST, LARGEST),
    "frequency_penalty": _Range(-LARGEST, LARGEST),
    "seed": _Range(-(2**63), 2**63 - 1),
}


def output_of(
    seq: Sequence,
    tokens: list[int],
    spec_steps: list[SpecStep],
    logprobs: list[TokenLogprobs] | None,
    *,
    is_first: bool = False,
) -> RequestOutput:
    """The output of a step that gave ``tokens``, already part of ``seq``; none where the request was aborted."""
    return RequestOutput(
        rid=seq.request.rid,
        token_ids=tokens,
        prompt_tokens=seq.num_prompt,
        completion_tokens=seq.num_output,
        cached_tokens=seq.cached_tokens or 0,
        logprobs=logprobs[: len(tokens)] if logprobs is not None else None,
        prompt_logprobs=seq.prompt_logprobs if is_first else None,
        finish_reason=seq.finish_reason,
        stop_token_id=seq.stop_token_id,
        error="the request was aborted" if seq.finish_reason == "abort" else None,
        spec_verify_ct=seq.num_verify_passes,
        num_drafted=seq.num_drafted,
        num_accepted=seq.num_accepted,
        spec_steps=spec_steps,
        queue_time=(seq.first_scheduled_time or time.monotonic()) - seq.arrival_time,
    )


def failure(seq: Sequence, message: str) -> RequestOutput:
    """The last output of a request that was aborted because it cannot be served any further as it asks."""
    last = output_of(seq, [], [], None)
    return msgspec.structs.replace(last, finish_reason="error", error=message, error_kind="invalid")


def refusal(request: AddRequest, kind: str, message: str) -> RequestOutput:
    """The only output of a request that is not taken."""
    return RequestOutput(
        rid=request.rid,
        token_ids=[],
        prompt_tokens=len(request.input_ids),
        completion_tokens=0,
        finish_reason="error",
        error=message,
        error_kind=kind,
    )


def check_request(request: AddRequest, *, context_length: int, vocab_size: int) -> None:
    """Raises RequestError if the request cannot be served, however long it waits."""
    num_prompt, sampling = len(request.input_ids), request.sampling
    if num_prompt == 0:
        raise RequestError("input_ids: the prompt is empty; give at least one token", "input_ids")
    if num_prompt + 1 > context_length:
        raise RequestError(
            f"the prompt has {num_prompt} tokens; the context of {context_length} leaves no room to generate",
            "input_ids",
            "context_length_exceeded",
        )
    _check_numbers(request)
    if request.grammar is not None and (sampling.ignore_eos or sampling.min_new_tokens):
        name = "ignore_eos" if sampling.ignore_eos else "min_new_tokens"
        raise RequestError(f"{name}: an output ends where its grammar does; leave one of the two out", name)
    token_ids = {
        "input_ids": request.input_ids,
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
    }
    for name, ids in token_ids.items():
        if min(ids, default=0) < 0 or max(ids, default=0) >= vocab_size:
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            raise RequestError(f"{name}: token id {bad} is outside the vocabulary of {vocab_size}", name)


def _check_numbers(request: AddRequest) -> None:
    sampling = request.sampling
    for name, allowed in _RANGES.items():
        allowed.check(name, getattr(sampling, name))
    _Range(0, sampling.max_new_tokens).check("min_new_tokens", sampling.min_new_tokens)
    for bias in sampling.logit_bias.values():
        _Range(-LARGEST, LARGEST).check("logit_bias", bias)
    if request.num_top_logprobs is not None and request.num_top_logprobs < 0:
        raise RequestError(f"logprobs: found {request.num_top_logprobs}, expected at least 0", "logprobs")
