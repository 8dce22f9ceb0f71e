"""Makes what computes: the KV pool in the memory there is, and the stepper over the models and the pool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nextn.checkpoint.loader import LoadedModel
from nextn.config.engine_config import EngineConfig
from nextn.errors import ConfigError
from nextn.execution.decode_runner import DecodeRunner
from nextn.execution.device import kv_dtype
from nextn.execution.memory import MemoryPlan, free_for_kv_on_cpu, kv_bytes_per_token, make_kv_cache, num_pages_for
from nextn.execution.step import Stepper
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.scheduler.scheduler import Scheduler
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.decode_step import DecodeStep
from nextn.speculative.policy import DraftLengthPolicy
from nextn.speculative.proposer import NextNProposer

RECORDED_CHUNK = 512
"""Prompt tokens whose memory is measured where --chunked-prefill-size sets no bound."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The KV pool. num_pages: without the scratch page; bytes_per_token: of K, V and hidden state."""

    kv_cache: KVCache
    num_pages: int
    context_length: int
    bytes_per_token: int


def make_pool(
    config: EngineConfig, loaded: LoadedModel, max_drafts: int, *, dtype: torch.dtype, device: torch.device
) -> Pool:
    """Allocate the KV pool. Raises ConfigError if memory does not hold one worth having."""
    model_config, has_draft = loaded.model_config, loaded.draft is not None
    if device.type == "cuda" and config.page_size & (config.page_size - 1):
        raise ConfigError(f"--page-size: found {config.page_size}, expected a power of two on a GPU")
    context = config.context_length or model_config.max_position_embeddings
    stored = kv_dtype(config, dtype)
    bytes_per_token = kv_bytes_per_token(model_config, dtype, stored, has_draft=has_draft)

    def kv_cache_of(num_pages: int) -> KVCache:
        return make_kv_cache(
            model_config,
            num_layers=model_config.num_hidden_layers + has_draft,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=stored,
            device=device,
        )

    if device.type == "cpu":
        free = free_for_kv_on_cpu()
    else:
        plan = _measured_plan(config, loaded, max_drafts, kv_cache_of, device)
        plan.check(bytes_per_token, 2 * config.page_size)
        logger.info("%s", plan.as_table())
        free = plan.kv
    num_pages = num_pages_for(
        bytes_per_token=bytes_per_token,
        page_size=config.page_size,
        max_total_tokens=config.max_total_tokens,
        wanted_tokens=config.max_running_requests * (context + config.page_size),
        free_bytes=free,
    )
    return Pool(kv_cache_of(num_pages), num_pages, min(context, num_pages * config.page_size), bytes_per_token)


def make_stepper(
    config: EngineConfig,
    loaded: LoadedModel,
    pool: Pool,
    scheduler: Scheduler,
    policy: DraftLengthPolicy | None,
    max_drafts: int,
) -> Stepper:
    """On a GPU decode steps get a runner of their own, with recordings as far as the config wants them."""
    kv_cache = pool.kv_cache
    proposer = None if loaded.draft is None else NextNProposer(loaded.draft, kv_cache)
    cycle = SpeculativeCycle(loaded.target, proposer, kv_cache, page_size=config.page_size)
    if kv_cache.k.device.type == "cpu" and not config.decode_on_device:
        return Stepper(scheduler, cycle, policy)
    runner = _decode_runner(config, loaded, proposer, kv_cache, pool.context_length, max_drafts)
    if config.enable_cuda_graph and kv_cache.k.is_cuda:
        runner.record(_max_recorded(config), range(max_drafts + 1) if policy is not None else {0, max_drafts})
    return Stepper(scheduler, cycle, policy, runner, overlap=config.enable_overlap)


def _max_recorded(config: EngineConfig) -> int:
    return min(config.cuda_graph_max_bs or config.max_running_requests, config.max_running_requests)


def _decode_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    proposer: NextNProposer | None,
    kv_cache: KVCache,
    context_length: int,
    max_drafts: int,
) -> DecodeRunner:
    state = DecodeState(
        num_slots=config.max_running_requests,
        vocab_size=loaded.model_config.vocab_size,
        context_length=context_length,
        max_drafts=max_drafts,
        page_size=config.page_size,
        scratch_page=kv_cache.k.shape[1] - 1,
        device=kv_cache.k.device,
    )
    return DecodeRunner(DecodeStep(loaded.target, proposer, kv_cache, state), state)


def _measured_plan(
    config: EngineConfig,
    loaded: LoadedModel,
    max_drafts: int,
    kv_cache_of: Callable[[int], KVCache],
    device: torch.device,
) -> MemoryPlan:
    """Compute the largest prompt chunk and the largest decode step once, over a small pool, and see what they take."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    weights = torch.cuda.memory_allocated(device)
    others = total - free - torch.cuda.memory_reserved(device)
    chunk = config.chunked_prefill_size if config.chunked_prefill_size > 0 else RECORDED_CHUNK
    num_pages = -(-chunk // config.page_size)
    kv_cache = kv_cache_of(num_pages)
    proposer = None if loaded.draft is None else NextNProposer(loaded.draft, kv_cache)

    def compute_chunk() -> None:
        batch = make_extend_batch([(0, chunk)], [range(num_pages)], config.page_size, device)
        hidden = loaded.target.forward(torch.zeros(chunk, dtype=torch.int64, device=device), batch, kv_cache)
        loaded.target.compute_logits(hidden[: config.max_running_requests * (max_drafts + 1)])

    def decode() -> None:
        runner = _decode_runner(config, loaded, proposer, kv_cache, num_pages * config.page_size, max_drafts)
        runner.rehearse(_max_recorded(config), max_drafts)

    activations = _peak_bytes(compute_chunk, device)
    graphs = _peak_bytes(decode, device)
    return MemoryPlan(total, config.mem_fraction_static, others, weights, activations, graphs)


@torch.inference_mode()
def _peak_bytes(compute: Callable[[], None], device: torch.device) -> int:
    """The most memory that ``compute`` takes beyond what is allocated already."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    compute()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak
