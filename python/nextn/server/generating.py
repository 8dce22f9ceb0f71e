"""From a checked request to its text as it grows: the part that all generating endpoints share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import msgspec

from nextn.protocol.messages import AddRequest, RequestOutput, SpecStep, TokenLogprobs, first_steps
from nextn.protocol.sampling import TokenSampling
from nextn.server.errors import from_output
from nextn.server.inbox import Generation
from nextn.server.services import Services
from nextn.text.output import OutputAssembler


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a request; ``text`` is None when it came as token ids."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided about a request before the engine hears of it.

    prompts, samplings, grammars, rids: one per prompt; each prompt has ``n`` choices, prompt after prompt
    make_assembler: the text side of one choice of the i-th prompt; gives None where there is no tokenizer
    keep_stop_tokens: one per prompt: whether the text includes that of the token which ended it
    discard_output: zero new tokens were asked for (prompt logprobs only): one is computed and dropped
    min_tokens_per_piece: gather that many tokens of a choice before looking at them
    """

    rid: str
    rids: Sequence[str]
    prompts: Sequence[Prompt]
    samplings: Sequence[TokenSampling]
    grammars: Sequence[str | None]
    make_assembler: Callable[[int], OutputAssembler | None]
    n: int
    keep_stop_tokens: Sequence[bool]
    discard_output: bool
    priority: int
    cache_salt: str
    num_top_logprobs: int | None
    prompt_logprobs_start: int | None
    min_tokens_per_piece: int


@dataclass(kw_only=True)
class Choice:
    """One choice as it grows: the totals that its answer needs at the end.

    num_drafted, num_accepted: of the steps that became output, up to where it ends
    """

    index: int
    rid: str
    prompt: Prompt
    assembler: OutputAssembler | None
    num_tokens: int = 0
    cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    spec_verify_ct: int = 0
    finish_reason: str | None = None
    matched: int | str | None = None
    has_begun: bool = False

    def count(self, output: RequestOutput, num_new: int, steps: Sequence[SpecStep]) -> None:
        """Add an output of which ``num_new`` tokens belong to the answer, which ``steps`` gave."""
        self.num_tokens += num_new
        self.cached_tokens = output.cached_tokens
        self.num_drafted += sum(step.num_drafted for step in steps)
        self.num_accepted += sum(step.num_accepted for step in steps)
        self.spec_verify_ct = output.spec_verify_ct
        self.has_begun = True

    def finish(self, reason: str | None, matched: int | str | None = None) -> None:
        self.finish_reason = reason
        self.matched = matched


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one choice gained. ``choice`` has its totals, this piece included."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    spec_steps: list[SpecStep]
    is_first: bool

    @property
    def is_empty(self) -> bool:
        """True if it has nothing to read: hidden tokens, or text that waits for its next token."""
        return not self.text and not self.logprobs and not self.prompt_logprobs and self.choice.finish_reason is None


async def generate(services: Services, plan: Plan) -> AsyncGenerator[list[Piece], None]:
    """Submit ``plan`` and yield what its choices gain, at most one piece per choice at a time.

    Raises ApiError when the engine refuses or fails a choice; the others are stopped. Closing the generator stops all,
    and so does the reader for one choice by finishing it.
    """
    requests = _engine_requests(plan)
    choices = [
        Choice(index=i, rid=request.rid, prompt=plan.prompts[i // plan.n], assembler=plan.make_assembler(i // plan.n))
        for i, request in enumerate(requests)
    ]
    generation = services.engine.submit(requests, _groups(plan, requests), plan.min_tokens_per_piece)
    try:
        while not generation.is_over:
            pieces = []
            for index, output in await generation.receive():
                if output.finish_reason == "error":
                    raise from_output(output)
                pieces.append(_grow(choices[index], output, plan))
            _stop_finished(generation, pieces)
            yield pieces
            _stop_finished(generation, pieces)
    finally:
        generation.close()


def _stop_finished(generation: Generation, pieces: list[Piece]) -> None:
    for piece in pieces:
        if piece.choice.finish_reason is not None:
            generation.stop(piece.choice.index)


def _grow(choice: Choice, output: RequestOutput, plan: Plan) -> Piece:
    """Add an engine output to a choice; a stop string may end it before the output's last token."""
    is_first = not choice.has_begun
    token_ids = [] if plan.discard_output else output.token_ids
    text = ""
    if plan.discard_output:
        choice.finish("length")
    else:
        choice.finish(output.finish_reason, output.stop_token_id)
        if choice.assembler is not None:
            keeps_all = output.stop_token_id is None or plan.keep_stop_tokens[choice.index // plan.n]
            shown = token_ids if keeps_all else token_ids[:-1]
            delta = choice.assembler.push(shown, output.finish_reason is not None)
            text = delta.text
            if delta.stopped:
                token_ids = token_ids[: delta.num_tokens]
                choice.finish("stop", delta.stop)
    steps = first_steps(output.spec_steps, len(token_ids))
    choice.count(output, len(token_ids), steps)
    return Piece(
        choice=choice,
        text=text,
        token_ids=token_ids,
        logprobs=(output.logprobs or [])[: len(token_ids)],
        prompt_logprobs=output.prompt_logprobs or [],
        spec_steps=steps,
        is_first=is_first,
    )


def _groups(plan: Plan, requests: Sequence[AddRequest]) -> dict[str, list[str]]:
    """What the client may call the choices of a prompt, and all of them, to abort them together."""
    names = [request.rid for request in requests]
    of_prompts = {rid: names[i * plan.n : (i + 1) * plan.n] for i, rid in enumerate(plan.rids)}
    return {**of_prompts, plan.rid: names}


def _engine_requests(plan: Plan) -> list[AddRequest]:
    """One engine request per choice; the i-th choice of a prompt draws with the prompt's seed + i."""
    requests = []
    for rid, prompt, sampling, grammar in zip(plan.rids, plan.prompts, plan.samplings, plan.grammars, strict=True):
        for i in range(plan.n):
            seed = (sampling.seed + i) % 2**63
            requests.append(
                AddRequest(
                    rid=rid if plan.n == 1 else f"{rid}-{i}",
                    input_ids=prompt.token_ids,
                    sampling=sampling if i == 0 else msgspec.structs.replace(sampling, seed=seed),
                    priority=plan.priority,
                    cache_salt=plan.cache_salt,
                    num_top_logprobs=plan.num_top_logprobs,
                    prompt_logprobs_start=plan.prompt_logprobs_start,
                    grammar=grammar,
                )
            )
    return requests
