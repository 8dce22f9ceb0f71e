"""The offline API: ``LLM(model).generate(prompts, SamplingParams(...))``, on the server's engine, in this process."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nextn.checkpoint.hub import resolved_config
from nextn.config.server_args import ServerArgs
from nextn.errors import ConfigError, RequestError
from nextn.execution.engine import Engine
from nextn.execution.ranks_beside import RanksBeside
from nextn.execution.threads import set_num_threads
from nextn.protocol.messages import AddRequest, EngineStats, RequestOutput, SpecStep, TokenLogprobs, first_steps
from nextn.protocol.sampling import TokenSampling
from nextn.text.grammar import Check, Form, ebnf_form, json_form, regex_form
from nextn.text.output import OutputAssembler
from nextn.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate. Defaults are OpenAI's.

    temperature: 0 is greedy
    top_k: -1 or 0 keeps all tokens
    json_schema, regex, ebnf: what the text must follow, at most one of them
    stop: strings that end the text before them; stop_token_ids: tokens that end it like an eos
    seed: the same seed, prompt and number of drafts give the same tokens; None draws one
    logprobs: None, or how many of the likeliest tokens to report beside each chosen one
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    json_schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Raises RequestError where one is empty, which every text has."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stops:
            raise RequestError("stop: found an empty string, expected at least one character", "stop")
        return stops

    def grammar(self, check: Check) -> str | None:
        """What the engine holds the output to. Raises RequestError where it is asked for wrongly."""
        forms: list[Form] = []
        if self.json_schema is not None:
            forms.append(json_form(self.json_schema, "json_schema", check))
        if self.regex is not None:
            forms.append(regex_form(self.regex, "regex", check))
        if self.ebnf is not None:
            forms.append(ebnf_form(self.ebnf, "ebnf", check))
        if len(forms) > 1:
            raise RequestError("json_schema, regex, ebnf: found several, expected at most one", "json_schema")
        return forms[0].as_grammar() if forms else None

    def for_engine(self, seed: int) -> TokenSampling:
        """The part that the engine applies, with the seed resolved."""
        return TokenSampling(
            max_new_tokens=self.max_new_tokens,
            seed=seed,
            has_own_seed=self.seed is not None,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=dict(self.logit_bias),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True)
class GenerationOutput:
    """What one prompt gave.

    output_ids: generated tokens, with the stop token that ended them if one did
    finish_reason: "stop", "length", "abort", or "error" where the output could not be held to its grammar any further
    meta_info: prompt_tokens, completion_tokens, cached_tokens, spec_verify_ct, spec_accept_length, …; spec_steps has
        per step (drafted, accepted, emitted): the first ``accepted`` of the step's tokens were drafted
    """

    text: str
    output_ids: list[int]
    finish_reason: str
    meta_info: dict[str, Any]
    logprobs: list[TokenLogprobs] | None = None


class LLM:
    """A model in this process.

    model_path: a folder or hub name; None is the embedded model
    options: any field of ServerArgs that concerns the engine, such as ``speculative_num_steps=0``. With ``tp_size`` the
        other ranks are processes beside this one; they import the main script again, so that it needs the usual
        ``if __name__ == "__main__":``. A process can have one such LLM at a time, until it is closed.
    """

    def __init__(self, model_path: str | None = None, **options: Any) -> None:
        args = ServerArgs(model_path=model_path, **options)
        if args.nnodes > 1:
            raise ConfigError(f"nnodes: found {args.nnodes}, expected 1; several nodes serve with launch_server")
        config = resolved_config(args)
        set_num_threads(config.model_path, args.num_threads, args.tp_size)
        self._ranks: RanksBeside | None = None
        if args.tp_size > 1:
            self._ranks = RanksBeside(config, args.tp_size, args.num_threads, args.log_level)
            self.engine = self._ranks.start_engine(config)
        else:
            self.engine = Engine(config)
        self.tokenizer = Tokenizer(args.tokenizer_path or config.model_path, args.chat_template)
        self._seeds = random.Random(args.random_seed)
        self._rids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Generate for every prompt (text, or token ids), batched by the engine; results are in the prompts' order.

        Raises RequestError if a prompt does not fit the context or a parameter is out of range.
        """
        prompt_list = _as_list(prompts)
        params = sampling_params if sampling_params is not None else SamplingParams()
        params_list = [params] * len(prompt_list) if isinstance(params, SamplingParams) else list(params)
        if len(params_list) != len(prompt_list):
            raise RequestError(f"found {len(params_list)} sampling_params for {len(prompt_list)} prompts")
        for one in params_list:
            one.grammar(self.engine.compile_grammar)  # before any request is added
        pending: dict[str, _Pending] = {}
        try:
            for prompt, one in zip(prompt_list, params_list, strict=True):
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
                rid = f"llm-{next(self._rids)}"
                pending[rid] = _Pending(self.tokenizer, one)
                self._add(pending, rid, ids, one)
            self._run(pending)
        except BaseException:  # an interrupt too must leave nothing that runs into the next call
            for rid in pending:
                self.engine.abort(rid)
            raise
        return [one.result() for one in pending.values()]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> GenerationOutput:
        """Render a conversation with the model's chat template and generate the next turn."""
        prompt = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(t) for t in tools] if tools else None,
            **template_kwargs,
        )
        return self.generate([self.tokenizer.encode(prompt, add_special_tokens=False)], sampling_params)[0]

    def close(self) -> None:
        """End the other ranks, if there are any; nothing can be generated afterwards. The process's end does it too."""
        if self._ranks is not None:
            self._ranks.close(self.engine)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def _add(self, pending: dict[str, _Pending], rid: str, ids: list[int], params: SamplingParams) -> None:
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = AddRequest(
            rid=rid,
            input_ids=ids,
            sampling=params.for_engine(seed),
            num_top_logprobs=params.logprobs,
            grammar=params.grammar(self.engine.compile_grammar),
        )
        while True:
            refusal = self.engine.add(request)
            if refusal is None:
                return
            if refusal.error_kind != "queue_full":
                raise RequestError(refusal.error or "the request was refused")
            self._step(pending)

    def _run(self, pending: dict[str, _Pending]) -> None:
        while self.engine.has_work:
            self._step(pending)
        with self._naming_losses():
            while self.engine.has_background_work:
                self.engine.work_in_background()

    def _naming_losses(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._ranks is None else self._ranks.naming_losses()

    def _step(self, pending: dict[str, _Pending]) -> None:
        with self._naming_losses():
            for output in self.engine.step():
                if pending[output.rid].push(output):
                    self.engine.abort(output.rid)
            self.engine.work_in_background()


class _Pending:
    """The text of one request as it grows."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._assembler = OutputAssembler(
            tokenizer,
            stop=params.stop_strings,
            min_new_tokens=params.min_new_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = [] if params.logprobs is not None else None
        self._spec_steps: list[SpecStep] = []
        self._last: RequestOutput | None = None
        self._stop_string: str | None = None

    def push(self, output: RequestOutput) -> bool:
        """Take one step's tokens; True if a stop string has ended the text while the engine goes on."""
        self._last = output
        ids = output.token_ids
        text_ids = ids[:-1] if output.stop_token_id is not None else ids
        delta = self._assembler.push(text_ids, output.finish_reason is not None)
        self._text.append(delta.text)
        used = delta.num_tokens if delta.stopped else len(ids)
        self._ids += ids[:used]
        self._spec_steps += first_steps(output.spec_steps, used)
        if self._logprobs is not None and output.logprobs is not None:
            self._logprobs += output.logprobs[:used]
        if delta.stopped:
            self._stop_string = delta.stop
        return delta.stopped and output.finish_reason is None

    def result(self) -> GenerationOutput:
        last = self._last
        assert last is not None, "a request ended without output"
        reason = "stop" if self._stop_string is not None else last.finish_reason
        assert reason is not None, "a request ended without a reason"
        completion_tokens = len(self._ids)
        meta_info = {
            "id": last.rid,
            "finish_reason": reason,
            "matched_stop": self._stop_string if self._stop_string is not None else last.stop_token_id,
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": completion_tokens,
            "cached_tokens": last.cached_tokens,
            "spec_verify_ct": last.spec_verify_ct,
            "spec_accept_length": completion_tokens / max(last.spec_verify_ct, 1),
            "num_drafted": last.num_drafted,
            "num_accepted": last.num_accepted,
            "spec_steps": [(step.num_drafted, step.num_accepted, step.num_tokens) for step in self._spec_steps],
        }
        return GenerationOutput("".join(self._text), self._ids, reason, meta_info, self._logprobs)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: text and lists of ids are one, lists of those are many."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and isinstance(items[0], int):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]
