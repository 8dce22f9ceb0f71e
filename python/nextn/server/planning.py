"""From checked fields to a plan: the limits that need the model or the prompt, applied once for all endpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nextn.protocol.sampling import TokenSampling
from nextn.server.errors import invalid
from nextn.server.generating import Plan, Prompt
from nextn.server.requests import SamplingFields
from nextn.server.sampling import context_limit, fit_output, stop_strings, token_sampling
from nextn.server.services import Services
from nextn.text.output import OutputAssembler


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one prompt's sampling fields say, under the names that its endpoint gives them.

    default_max_tokens: when ``max_tokens`` is None; None is all that the context leaves
    grammar: what the output must follow; None for nothing
    prefix: where the fields stand in the body, for error messages
    """

    fields: SamplingFields
    max_tokens: int | None
    min_tokens: int | None
    seed: int | None
    default_max_tokens: int | None
    grammar: str | None
    prefix: str = ""
    prompt_param: str = "prompt"
    min_param: str = "min_tokens"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What holds for all prompts of one HTTP request.

    is_batch: the prompts came as a list, and each is named by its index
    watches_text: the answer may be ended early by what its text says, beside stop strings
    """

    rid: str
    rids: Sequence[str]
    n: int
    streams: bool
    is_batch: bool = False
    watches_text: bool = False
    priority: int | None = None
    cache_salt: str | None = None
    num_top_logprobs: int | None = None
    prompt_logprobs_start: int | None = None


def make_plan(services: Services, prompts: Sequence[Prompt], wishes: Sequence[Wish], options: Options) -> Plan:
    """Resolve every default and check every limit.

    wishes: one per prompt
    Raises ApiError 400, naming the field.
    """
    most = services.args.max_choices
    if options.n > most:
        raise invalid(f"'n' is {options.n}; at most {most} choices are served.", "n", "invalid_value")
    num_choices, most = options.n * len(prompts), services.args.max_requests_in_flight
    if num_choices > most:
        message = f"{len(prompts)} prompts with n={options.n} are {num_choices} requests; at most {most} run and wait."
        raise invalid(f"{message} Send fewer at once.", wishes[0].prompt_param, "invalid_value")
    samplings = [
        _sampling(services, prompt, wish, f"{wish.prompt_param}[{index}]" if options.is_batch else wish.prompt_param)
        for index, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
    ]
    discards = {wish.max_tokens == 0 for wish in wishes}
    if len(discards) > 1:
        raise invalid("Either all prompts of a batch ask for zero new tokens, or none does.", "sampling_params")
    makers = [_assembler_maker(services, wish) for wish in wishes]
    return Plan(
        rid=options.rid,
        rids=options.rids,
        prompts=prompts,
        samplings=samplings,
        grammars=[wish.grammar for wish in wishes],
        make_assembler=lambda i: makers[i](),
        n=options.n,
        discard_output=discards == {True},
        keep_stop_tokens=[_keeps_stop(wish.fields) for wish in wishes],
        priority=options.priority or 0,
        cache_salt=options.cache_salt or "",
        num_top_logprobs=options.num_top_logprobs,
        prompt_logprobs_start=options.prompt_logprobs_start,
        min_tokens_per_piece=_min_tokens_per_piece(services, wishes, options),
    )


def _sampling(services: Services, prompt: Prompt, wish: Wish, prompt_param: str) -> TokenSampling:
    ready = services.engine.require_ready()
    limit = context_limit(ready)
    num_prompt = len(prompt.token_ids)
    num_output = fit_output(num_prompt, wish.max_tokens, wish.default_max_tokens, limit, prompt_param)
    min_tokens = wish.min_tokens or 0
    param = f"{wish.prefix}{wish.min_param}"
    if min_tokens and wish.grammar is not None:
        message = f"'{param}' cannot go with a schema or a grammar: the answer ends where that does."
        raise invalid(message, param, "invalid_value")
    if min_tokens > num_output:
        message = f"'{param}' is {min_tokens}, but at most {num_output} tokens are generated."
        raise invalid(message, param, "invalid_value")
    return token_sampling(
        wish.fields,
        max_new_tokens=max(num_output, 1),
        min_new_tokens=min_tokens,
        seed=services.new_seed() if wish.seed is None else wish.seed,
        has_own_seed=wish.seed is not None,
        defaults=services.defaults,
        vocab_size=ready.vocab_size,
        prefix=wish.prefix,
    )


def _assembler_maker(services: Services, wish: Wish) -> Callable[[], OutputAssembler | None]:
    fields = wish.fields
    stops = stop_strings(fields, services.args.max_stop_sequences, wish.prefix)
    if services.tokenizer is None and not stops:
        return lambda: None
    tokenizer = services.require_tokenizer(f"{wish.prefix}stop", "use 'stop_token_ids'")
    return lambda: OutputAssembler(
        tokenizer,
        stop=stops,
        keep_stop=_keeps_stop(fields),
        min_new_tokens=wish.min_tokens or 0,
        skip_special_tokens=fields.skip_special_tokens is not False,
    )


def _keeps_stop(fields: SamplingFields) -> bool:
    return bool(fields.no_stop_trim or fields.include_stop_str_in_output)


def _min_tokens_per_piece(services: Services, wishes: Sequence[Wish], options: Options) -> int:
    """How many tokens to gather before looking at them: all, when nobody can see or stop them earlier."""
    if options.streams:
        return int(services.args.stream_interval)
    return 1 if options.watches_text or any(wish.fields.stop for wish in wishes) else 2**31
