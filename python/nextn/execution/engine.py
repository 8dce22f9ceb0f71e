"""The engine: takes requests, runs steps, gives back new tokens. Synchronous; one thread owns it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import msgspec
import torch
from llguidance import LLMatcher

from nextn.config.engine_config import MAX_NUM_DRAFT_STEPS, EngineConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.errors import PeerLost, RequestError
from nextn.execution.counters import Counters
from nextn.execution.outputs import check_request, failure, output_of, refusal
from nextn.execution.rehearsal import prepare
from nextn.execution.shard import DEFAULT_NUM_DRAFT_STEPS, load_shard
from nextn.execution.step import Stepper
from nextn.kernels import native
from nextn.protocol.draft_health import DraftHealth, ShadowCounts
from nextn.protocol.messages import AddRequest, EngineStats, RequestOutput, SpecStep
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Scheduler, SchedulerConfig
from nextn.scheduler.sequence import Sequence
from nextn.speculative.monitor import AcceptanceMonitor
from nextn.speculative.policy import DraftLengthPolicy
from nextn.speculative.shadow import ShadowCheck

logger = logging.getLogger(__name__)


class Engine:
    """A model, its KV pool, a scheduler, and the cycle that runs them."""

    def __init__(self, config: EngineConfig, tp: TensorParallel = SINGLE) -> None:
        """Load the checkpoint and allocate the KV pool.

        tp: of rank 0; on every other rank a ``Follower`` runs
        Raises CheckpointError or ConfigError, whose message says what to change.
        """
        started = time.monotonic()
        self.config = config
        shard = load_shard(config, tp)
        self._loaded, self._cycle, self._grammars = shard.loaded, shard.cycle, shard.grammars
        model_config, draft = self._loaded.model_config, self._loaded.draft
        num_drafts = config.num_draft_steps
        policy: DraftLengthPolicy | None = None
        if num_drafts is None:
            num_drafts = DEFAULT_NUM_DRAFT_STEPS if draft is not None else 0
            policy = DraftLengthPolicy(MAX_NUM_DRAFT_STEPS) if draft is not None else None
        self.max_draft_steps = shard.max_draft_steps
        self.context_length = shard.context_length
        self.vocab_size = model_config.vocab_size
        self.eos_token_ids = _possible(model_config.eos_token_ids, model_config.vocab_size)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running=config.max_running_requests,
                max_queued=config.max_queued_requests,
                max_prefill_tokens=shard.max_prefill_tokens,
                context_length=self.context_length,
                num_drafts=num_drafts,
                by_priority=config.schedule_policy == "priority",
                eos_token_ids=self.eos_token_ids,
                drafts_under_grammar=shard.runner is None,
            ),
            KVPages(shard.num_pages, config.page_size, enable_prefix_cache=config.enable_prefix_cache),
        )
        self._counters = Counters(self.max_draft_steps)
        self._stepper = Stepper(
            self.scheduler, shard.cycle, policy, shard.runner, shard.grammars, overlap=config.enable_overlap
        )
        self._canary = prepare(
            config,
            self._stepper,
            device=shard.kv_cache.k.device,
            max_prefill_tokens=shard.max_prefill_tokens,
            max_drafts=self.max_draft_steps,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
        )
        self._monitor = AcceptanceMonitor(
            self.max_draft_steps,
            is_trained=config.load_format != "dummy",
            is_proven=self._canary.verdict == "healthy",
        )
        self._shadow: ShadowCheck | None = None
        if config.shadow_rate:
            self._shadow = ShadowCheck(
                self._loaded.target, shard.kv_cache, self.scheduler.pages, config.shadow_rate, self._cycle.leader
            )
        self.load_seconds = time.monotonic() - started
        for row in self._loaded.report.as_table().splitlines():
            logger.info("%s", row)
        logger.info(
            "KV pool: %d tokens in %d pages, %.0f MiB; %s drafts per step; ready after %.1f s",
            shard.num_pages * config.page_size,
            shard.num_pages,
            shard.num_pages * config.page_size * shard.bytes_per_token / 2**20,
            num_drafts if policy is None else f"0 … {MAX_NUM_DRAFT_STEPS}",
            self.load_seconds,
        )
        if shard.kv_cache.k.is_cpu:
            if native.cpu is None:
                logger.warning(
                    "the compiled CPU kernels are missing or of another version, and torch computes in their place, "
                    "more slowly; install nextn again, with a C compiler"
                )
            else:
                logger.info("CPU kernels: compiled, for %s", next(iter(native.cpu.instruction_sets)))

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return self.scheduler.has_work

    @property
    def has_background_work(self) -> bool:
        """Whether there is something to do while no request runs or waits."""
        return self._shadow is not None and self._shadow.has_work

    def work_in_background(self) -> None:
        """Do a little of what nobody waits for. Call it between steps, once their outputs have left."""
        if self._shadow is not None:
            self._shadow.run(is_idle=not self.has_work)

    def add(self, request: AddRequest, matcher: LLMatcher | None = None) -> RequestOutput | None:
        """Queue a request. Returns its terminal output at once if it is refused, else None.

        matcher: of its grammar, which is compiled here without
        """
        try:
            if request.rid in self.scheduler:
                raise RequestError(f"rid: {request.rid!r} is in use by a running request; choose another", "rid")
            check_request(request, context_length=self.context_length, vocab_size=self.vocab_size)
            if self.scheduler.is_full:
                limit = self.config.max_running_requests + self.config.max_queued_requests
                return refusal(request, "queue_full", f"{limit} requests run or wait already; try again later")
            if request.grammar is not None and matcher is None:
                matcher = self._grammars.compile(request.grammar)
        except RequestError as error:
            return refusal(request, "invalid", str(error))
        seq = self.scheduler.add(request)
        if matcher is not None:
            self._grammars.start(seq, matcher)
        return None

    def compile_grammar(self, grammar: str) -> LLMatcher:
        """From any thread: a matcher for ``add``. Raises RequestError where outputs cannot be held to it."""
        return self._grammars.compile(grammar)

    def known_grammar(self, grammar: str) -> LLMatcher | None:
        """``compile_grammar`` of one that is compiled; None where it is not."""
        return self._grammars.known(grammar)

    def abort(self, rid: str | None) -> list[RequestOutput]:
        """End one request, or all with None. Its pages are free when this returns. Returns the terminal outputs."""
        rids = [seq.request.rid for seq in self.scheduler.sequences] if rid is None else [rid]
        aborted = [seq for seq in map(self.scheduler.abort, rids) if seq is not None]
        self._counters.num_aborted += len(aborted)
        return [output_of(seq, [], [], None) for seq in aborted]

    def step(self, num_drafts: int | None = None) -> list[RequestOutput]:
        """Run one cycle over everything that can run. Returns the outputs of sequences that got tokens.

        num_drafts: see ``Stepper.step``
        """
        if self._shadow is not None:
            self._shadow.make_way(self.scheduler.num_pages_wanted)
        steps, failed = self._stepper.step(num_drafts), self._grammars.take_failed()
        outputs = [self._give_up(seq, reason) for seq, reason in failed.items()]
        for extend, decision, kept, is_first in steps:
            if extend.seq in failed:
                continue
            self._counters.count(extend, decision, kept, is_first=is_first)
            if extend.num_drafts and extend.seq.request.grammar is None:
                self._monitor.count(extend, decision)
            if kept:
                step = SpecStep(extend.num_drafts, min(decision.num_accepted, len(kept)), len(kept))
                outputs.append(output_of(extend.seq, kept, [step], decision.logprobs, is_first=is_first))
            if self._shadow is not None and extend.seq.finish_reason is not None and extend.seq.request.grammar is None:
                self._shadow.offer(extend.seq)
        if any(one.extend.num_drafts for one in steps):
            self._monitor.end_step()
        self._counters.num_steps += bool(steps)
        return outputs

    def _give_up(self, seq: Sequence, reason: str) -> RequestOutput:
        """End a request whose grammar cannot be followed any further; what its last step said is not passed on."""
        logger.warning("request %s: its grammar failed: %s", seq.request.rid, reason)
        if seq.finish_reason is None:
            self.scheduler.abort(seq.request.rid)
        self._counters.num_aborted += 1
        return failure(seq, f"the answer's grammar: {reason}")

    def still_here(self) -> None:
        """Tell the other ranks, if there are any, that nothing is wrong although nothing happens."""
        self._cycle.leader.still_here()

    def close(self) -> None:
        """Let the other ranks end. Nothing can be computed afterwards. Raises PeerLost if one is lost."""
        try:
            self._cycle.leader.finish()
        except PeerLost:
            self._stepper.forget(is_waited_for=False)
            raise
        self._stepper.forget()

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
            num_free_pages=pages.num_free + (self._shadow.num_pages_held if self._shadow is not None else 0),
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

    @property
    def health_revision(self) -> int:
        """Changes when ``draft_health`` has something new to say."""
        shadow = self._shadow.counts if self._shadow is not None else ShadowCounts()
        return self._monitor.revision + shadow.num_requests + shadow.num_skipped

    def draft_health(self) -> DraftHealth:
        monitor, canary = self._monitor, self._canary
        shadow = self._shadow.counts if self._shadow is not None else None
        of_canary = canary.message if canary.verdict == "sick" else None
        return DraftHealth(
            state=monitor.state,
            complaint=(shadow.complaint if shadow is not None else None) or monitor.complaint or of_canary,
            num_collapses=monitor.num_collapses,
            windows=monitor.windows(),
            canary=canary,
            shadow=shadow,
        )

    def info(self) -> dict[str, Any]:
        """Plain values for /get_server_info: configuration, load report, and figures so far."""
        stats, policy = self.stats(), self._stepper.policy
        return {
            "engine_config": asdict(self.config),
            "num_draft_steps": self.max_draft_steps,
            "draft_policy": None if policy is None else {"acceptance": list(policy.acceptance)},
            "context_length": self.context_length,
            "max_total_tokens": stats.num_pages * stats.page_size,
            "load_report": self._loaded.report.as_dict(),
            "load_seconds": self.load_seconds,
            "accept_length": stats.accept_length,
            "draft_health": self.draft_health().as_dict(),
            "stats": msgspec.to_builtins(stats),
            "torch_version": str(torch.__version__),
            "num_threads": torch.get_num_threads(),
        }


def _possible(eos_token_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Those of the vocabulary: no other can be decided, nor be masked while a request has to go on."""
    outside = [token for token in eos_token_ids if token >= vocab_size]
    if outside:
        logger.warning(
            "eos_token_id: found %s, which the vocabulary of %d does not have, so that nothing ends with it; correct "
            "config.json and generation_config.json",
            ", ".join(map(str, outside)),
            vocab_size,
        )
    return tuple(token for token in eos_token_ids if token < vocab_size)
