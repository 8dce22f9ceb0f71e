"""The engine: takes requests, runs steps, gives back new tokens. Synchronous; one thread owns it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import msgspec
import torch

from nextn.checkpoint.loader import load_model
from nextn.config.engine_config import EngineConfig
from nextn.errors import RequestError
from nextn.execution.memory import kv_bytes_per_token, make_kv_cache, num_pages_for
from nextn.protocol.messages import AddRequest, EngineStats, RequestOutput, SpecStep, TokenLogprobs
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Decision, Extend, Scheduler, SchedulerConfig
from nextn.scheduler.sequence import Sequence
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.policy import TRIES_AT_FIRST, DraftLengthPolicy
from nextn.speculative.proposer import NextNProposer

DEFAULT_NUM_DRAFT_STEPS = 3
"""Drafts of a request that samples with its own seed, whatever the policy prefers for others."""

MAX_NUM_DRAFT_STEPS = 5
"""The most that the policy tries."""

WARM_UP_TOKENS = TRIES_AT_FIRST * (MAX_NUM_DRAFT_STEPS + 1) * (MAX_NUM_DRAFT_STEPS + 2)
"""Enough for a try of every number of drafts, were all of them accepted."""

logger = logging.getLogger(__name__)


class Engine:
    """A model, its KV pool, a scheduler, and the cycle that runs them."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the checkpoint and allocate the KV pool.

        Raises CheckpointError or ConfigError, whose message says what to change.
        """
        started = time.monotonic()
        device = torch.device("cpu")
        self.config = config
        self._loaded = load_model(config, device=device, dtype=_dtype(config.dtype), want_draft=config.wants_draft)
        model_config, draft = self._loaded.model_config, self._loaded.draft
        num_drafts = config.num_draft_steps
        self._policy: DraftLengthPolicy | None = None
        if num_drafts is None:
            num_drafts = DEFAULT_NUM_DRAFT_STEPS if draft is not None else 0
            self._policy = DraftLengthPolicy(MAX_NUM_DRAFT_STEPS) if draft is not None else None
        self.max_draft_steps = num_drafts if self._policy is None else MAX_NUM_DRAFT_STEPS

        context = config.context_length or model_config.max_position_embeddings
        num_layers = model_config.num_hidden_layers + (draft is not None)
        dtype = self._loaded.target.dtype
        num_pages = num_pages_for(
            model_config,
            num_layers=num_layers,
            dtype=dtype,
            page_size=config.page_size,
            max_total_tokens=config.max_total_tokens,
            wanted_tokens=config.max_running_requests * (context + config.page_size),
        )
        self.context_length = min(context, num_pages * config.page_size)
        self.vocab_size = model_config.vocab_size
        self.eos_token_ids = tuple(model_config.eos_token_ids)
        kv_cache = make_kv_cache(
            model_config,
            num_layers=num_layers,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=dtype,
            device=device,
        )
        proposer = None
        if draft is not None:
            proposer = NextNProposer(draft, kv_cache)
        self._cycle = SpeculativeCycle(self._loaded.target, proposer, kv_cache, page_size=config.page_size)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running=config.max_running_requests,
                max_queued=config.max_queued_requests,
                max_prefill_tokens=max(config.chunked_prefill_size, 0),
                context_length=self.context_length,
                num_drafts=num_drafts,
                by_priority=config.schedule_policy == "priority",
                eos_token_ids=self.eos_token_ids,
            ),
            KVPages(num_pages, config.page_size, enable_prefix_cache=config.enable_prefix_cache),
        )
        self._counters = _Counters(self.max_draft_steps)
        self._warm_up()
        self.load_seconds = time.monotonic() - started
        logger.info(
            "%s\nKV pool: %d tokens in %d pages, %.0f MiB; %s drafts per step; ready after %.1f s",
            self._loaded.report.as_table(),
            num_pages * config.page_size,
            num_pages,
            num_pages * config.page_size * kv_bytes_per_token(model_config, num_layers, dtype) / 2**20,
            num_drafts if self._policy is None else f"0 … {MAX_NUM_DRAFT_STEPS}",
            self.load_seconds,
        )

    def _warm_up(self) -> None:
        """Run a short request through every part, so that the first user does not pay for lazy initialisation.

        It is as long as the policy needs to time every number of drafts.
        """
        prompt = [i % self.vocab_size for i in range(self.config.page_size)]
        new_tokens = min(8 if self._policy is None else WARM_UP_TOKENS, self.context_length - len(prompt))
        if new_tokens > 0:
            self.add(
                AddRequest(
                    rid="warm-up",
                    input_ids=prompt,
                    sampling=TokenSampling(max_new_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True),
                )
            )
        while self.has_work:
            self.step()
        self.scheduler.pages.flush()
        self._counters = _Counters(self.max_draft_steps)
        self.scheduler.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: AddRequest) -> RequestOutput | None:
        """Queue a request. Returns its terminal output at once if it is refused, else None."""
        try:
            self._validate(request)
        except RequestError as error:
            return self._refusal(request, "invalid", str(error))
        if self.scheduler.is_full:
            limit = self.config.max_queued_requests
            return self._refusal(request, "queue_full", f"{limit} requests are queued already; try again later")
        self.scheduler.add(request)
        return None

    def _validate(self, request: AddRequest) -> None:
        num_prompt, sampling = len(request.input_ids), request.sampling
        if request.rid in self.scheduler:
            raise RequestError(f"rid: {request.rid!r} is in use by a running request; choose another", "rid")
        if num_prompt == 0:
            raise RequestError("input_ids: the prompt is empty; give at least one token", "input_ids")
        if sampling.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens: found {sampling.max_new_tokens}, expected at least 1", "max_new_tokens"
            )
        if num_prompt + 1 > self.context_length:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; the context of {self.context_length} leaves no room to generate",
                "input_ids",
                "context_length_exceeded",
            )
        ids = (*request.input_ids, *sampling.logit_bias, *sampling.stop_token_ids)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.vocab_size}", "input_ids")

    @staticmethod
    def _refusal(request: AddRequest, kind: str, message: str) -> RequestOutput:
        return RequestOutput(
            rid=request.rid,
            token_ids=[],
            prompt_tokens=len(request.input_ids),
            completion_tokens=0,
            finish_reason="error",
            error=message,
            error_kind=kind,
        )

    def abort(self, rid: str | None) -> list[RequestOutput]:
        """End one request, or all with None. Its pages are free when this returns. Returns the terminal outputs."""
        rids = [seq.request.rid for seq in self.scheduler.sequences] if rid is None else [rid]
        aborted = [seq for seq in map(self.scheduler.abort, rids) if seq is not None]
        self._counters.num_aborted += len(aborted)
        return [self._output(seq, [], [], None) for seq in aborted]

    def step(self) -> list[RequestOutput]:
        """Run one cycle over everything that can run. Returns the outputs of sequences that got tokens."""
        policy, num_drafts = self._policy, None
        if policy is not None:
            num_decoding = self.scheduler.num_decoding
            will_be_timed = num_decoding > 0 and self.scheduler.only_decodes
            num_drafts = policy.choose(max(num_decoding, 1), will_be_timed=will_be_timed)
        extends = self.scheduler.schedule(num_drafts)
        if not extends:
            return []
        started = time.perf_counter()
        decisions = self._cycle.run(extends)
        if policy is not None:
            _tell_time(policy, extends, decisions, time.perf_counter() - started)
        outputs = []
        for extend, decision in zip(extends, decisions, strict=True):
            is_first = extend.seq.num_output == 0
            kept = self.scheduler.commit(extend, decision)
            self._counters.count(extend, decision, kept, is_first=is_first)
            if policy is not None and extend.num_drafts:
                # Drafts beyond the end of a request were accepted for nothing.
                policy.observe_acceptance(extend.num_drafts, len(kept) - 1)
            if kept:
                step = SpecStep(extend.num_drafts, min(decision.num_accepted, len(kept)), len(kept))
                outputs.append(self._output(extend.seq, kept, [step], decision.logprobs, is_first=is_first))
        self._counters.num_steps += 1
        return outputs

    @staticmethod
    def _output(
        seq: Sequence,
        tokens: list[int],
        spec_steps: list[SpecStep],
        logprobs: list[TokenLogprobs] | None,
        *,
        is_first: bool = False,
    ) -> RequestOutput:
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

    def flush_cache(self) -> int:
        """Drop every cached prefix that no request uses; returns the number of pages freed."""
        return self.scheduler.pages.flush()

    def stats(self) -> EngineStats:
        pages = self.scheduler.pages
        counters = self._counters
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_queued=len(self.scheduler.waiting),
            num_pages=pages.num_pages,
            num_free_pages=pages.num_free,
            num_cached_pages=pages.cache.num_evictable,
            page_size=pages.page_size,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generation_tokens=counters.generation_tokens,
            num_steps=counters.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_aborted=counters.num_aborted,
            num_finished=counters.num_finished,
            num_verify_passes=counters.num_verify_passes,
            drafted_per_position=list(counters.drafted),
            accepted_per_position=list(counters.accepted),
        )

    def info(self) -> dict[str, Any]:
        """Plain values for /get_server_info: configuration, load report, and figures so far."""
        stats = self.stats()
        return {
            "engine_config": asdict(self.config),
            "num_draft_steps": self.max_draft_steps,
            "draft_policy": None if self._policy is None else {"acceptance": list(self._policy.acceptance)},
            "context_length": self.context_length,
            "max_total_tokens": stats.num_pages * stats.page_size,
            "load_report": self._loaded.report.as_dict(),
            "load_seconds": self.load_seconds,
            "accept_length": stats.accept_length,
            "stats": msgspec.to_builtins(stats),
            "torch_version": str(torch.__version__),
            "num_threads": torch.get_num_threads(),
        }


def _tell_time(policy: DraftLengthPolicy, extends: list[Extend], decisions: list[Decision], seconds: float) -> None:
    """What the policy can learn from a step's length, if every sequence did the same.

    Called before the scheduler takes the decisions in.
    """
    num_drafts = extends[0].num_drafts
    if not all(extend.num_tokens == 1 and extend.decides and extend.num_drafts == num_drafts for extend in extends):
        return
    if num_drafts or all(
        decision.num_draft_computed == extend.seq.num_draft_computed
        for extend, decision in zip(extends, decisions, strict=True)
    ):
        policy.observe(len(extends), num_drafts, seconds)
    else:
        policy.observe_catching_up(len(extends), seconds)


class _Counters:
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
            for j in range(extend.num_drafts):
                self.drafted[j] += 1
                self.accepted[j] += j < decision.num_accepted


def _dtype(name: str) -> torch.dtype:
    """The computing type on CPU."""
    return {
        "auto": torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]
