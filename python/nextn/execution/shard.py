"""What each rank holds: its part of the models and of the KV pool, and what computes with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import MAX_NUM_DRAFT_STEPS, EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import TensorParallel
from nextn.errors import ConfigError
from nextn.execution.compiling import META, compile_kernels, prompts_of_every_kind, without_memory
from nextn.execution.decode_runner import DecodeRunner, padded_sizes
from nextn.execution.device import choose_device, computing_dtype, kv_dtype
from nextn.execution.memory import (
    MemoryPlan,
    free_for_kv_on_cpu,
    kv_bytes_per_token,
    make_kv_cache,
    memory_of_cpu,
    num_pages_for,
    out_of_memory_means,
)
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.protocol.ranks import DecodeBatch
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.decode_step import DecodeStep
from nextn.speculative.follower import Follower
from nextn.speculative.grammar import Grammars
from nextn.speculative.proposer import NextNProposer

DEFAULT_NUM_DRAFT_STEPS = 3
"""Drafts of a request that samples with its own seed, whatever the policy prefers for others."""

PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
"""Most prompt tokens of a step. A GPU reads most experts for any prompt; the more tokens share that, the better."""

MAX_PREFILL_TOKENS_ON_GPU = 16384
"""What --chunked-prefill-size -1 comes to on a GPU, whose memory for a step is planned."""

SAMPLING_COPIES = 6
"""Arrays of [rows, vocabulary] in float32 that choosing tokens takes outside of recordings, at most."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelShard:
    """num_pages: in the KV pool without the scratch page, the same on every rank; context_length: most tokens of one
        request
    bytes_per_token: of the pool, on this rank
    max_prefill_tokens: most prompt tokens of a step; 0 is no bound
    max_draft_steps: the most drafts of a step
    runner: of decode steps, on a GPU
    """

    loaded: LoadedModel
    kv_cache: KVCache
    num_pages: int
    context_length: int
    bytes_per_token: int
    max_prefill_tokens: int
    max_draft_steps: int
    grammars: Grammars
    cycle: SpeculativeCycle
    runner: DecodeRunner | None

    def follow(self, tp: TensorParallel) -> None:
        """Compute what rank 0 says, on any other rank, until it says that this is the end. Raises PeerLost."""
        Follower(tp, self.cycle, self._decode, self.loaded.target, self.kv_cache).run()
        if self.runner is not None:
            self.runner.forget()

    def _decode(self, batch: DecodeBatch) -> None:
        assert self.runner is not None, "rank 0 has a runner, so every rank has"
        self.runner.launch(batch)


def load_shard(config: EngineConfig, tp: TensorParallel) -> ModelShard:
    """Load the checkpoint, allocate the KV pool in the memory there is, and record decode steps on a GPU.

    Raises CheckpointError or ConfigError, whose message says what to change.
    """
    device = choose_device(config.device, tp.local_rank)
    if device.type == "cuda" and config.page_size & (config.page_size - 1):
        raise ConfigError(f"--page-size: found {config.page_size}, expected a power of two on a GPU")
    dtype = computing_dtype(config, device)
    with out_of_memory_means("for the weights raise --tp-size, or end what else uses it"):
        loaded = load_model(config, device=device, dtype=dtype, want_draft=config.wants_draft, tp=tp)
    model_config, has_draft = loaded.model_config, loaded.draft is not None
    context = config.context_length or model_config.max_position_embeddings
    stored = kv_dtype(config, dtype)
    bytes_per_token = kv_bytes_per_token(model_config, dtype, stored, has_draft=has_draft, tp_size=tp.size)
    max_drafts = _max_drafts(config, has_draft)
    chunk = _max_prefill_tokens(config, device)

    def kv_cache_of(num_pages: int, device: torch.device = device) -> KVCache:
        return make_kv_cache(
            model_config,
            num_layers=model_config.num_hidden_layers + has_draft,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=stored,
            device=device,
            tp_size=tp.size,
        )

    if device.type == "cpu":
        free, all_bytes = (size // tp.ranks_per_node for size in (free_for_kv_on_cpu(), memory_of_cpu()))
    else:
        if tp.local_rank == 0:
            _compile_ahead(config, loaded, kv_cache_of, chunk, context, max_drafts, tp)
        tp.wait()  # the others find on disk what is compiled
        with out_of_memory_means("lower --chunked-prefill-size or --max-running-requests, or raise --tp-size"):
            plan = _measured_plan(config, loaded, chunk, max_drafts, kv_cache_of, device, tp)
        plan.check(bytes_per_token, 2 * config.page_size)
        for row in plan.as_table().splitlines():
            logger.info("%s", row)
        free, all_bytes = plan.kv, plan.total
    num_pages = tp.least(
        num_pages_for(
            bytes_per_token=bytes_per_token,
            page_size=config.page_size,
            max_total_tokens=config.max_total_tokens,
            wanted_tokens=config.max_running_requests * (context + config.page_size),
            free_bytes=free,
            all_bytes=all_bytes,
        )
    )
    context = min(context, num_pages * config.page_size)
    grammars = _grammars(config, model_config, tp)
    runner: DecodeRunner | None = None
    with out_of_memory_means("lower --max-total-tokens, --mem-fraction-static or --cuda-graph-max-bs"):
        kv_cache = kv_cache_of(num_pages)
        proposer = None if loaded.draft is None else NextNProposer(loaded.draft, kv_cache)
        cycle = SpeculativeCycle(
            loaded.target, proposer, kv_cache, page_size=config.page_size, grammars=grammars, tp=tp
        )
        if device.type == "cuda" or config.decode_on_device:
            runner = _decode_runner(config, loaded, proposer, kv_cache, context, max_drafts, tp)
            if config.enable_cuda_graph and device.type == "cuda":
                runner.record(_max_recorded(config), _recorded_drafts(config, max_drafts), show=tp.is_first)
    return ModelShard(loaded, kv_cache, num_pages, context, bytes_per_token, chunk, max_drafts, grammars, cycle, runner)


def _grammars(config: EngineConfig, model_config: ModelConfig, tp: TensorParallel) -> Grammars:
    """Of rank 0, which alone decides tokens."""
    if not (config.serves_grammars and tp.is_first):
        return Grammars(None, model_config.vocab_size)
    ends = [token for token in model_config.eos_token_ids if token < model_config.vocab_size]
    return Grammars.of_tokenizer(config.tokenizer_path or config.model_path, model_config.vocab_size, ends)


def _max_prefill_tokens(config: EngineConfig, device: torch.device) -> int:
    """0 is no bound."""
    wanted = config.chunked_prefill_size
    if wanted is None:
        return PREFILL_TOKENS[device.type]
    if device.type == "cpu":
        return max(wanted, 0)
    return wanted if 0 < wanted < MAX_PREFILL_TOKENS_ON_GPU else MAX_PREFILL_TOKENS_ON_GPU


def _max_drafts(config: EngineConfig, has_draft: bool) -> int:
    if config.num_draft_steps is not None:
        return config.num_draft_steps
    return MAX_NUM_DRAFT_STEPS if has_draft else 0


def _recorded_drafts(config: EngineConfig, max_drafts: int) -> list[int]:
    """Numbers of drafts that a step may have. Where the number is fixed, some requests with a grammar have none."""
    if config.num_draft_steps is None:
        return list(range(max_drafts + 1))
    return sorted({0, max_drafts}) if config.serves_grammars else [max_drafts]


def _max_recorded(config: EngineConfig) -> int:
    return min(config.cuda_graph_max_bs or config.max_running_requests, config.max_running_requests)


def _decode_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    proposer: NextNProposer | None,
    kv_cache: KVCache,
    context_length: int,
    max_drafts: int,
    tp: TensorParallel,
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
    return DecodeRunner(DecodeStep(loaded.target, proposer, kv_cache, state, tp), state)


def _compile_ahead(
    config: EngineConfig,
    loaded: LoadedModel,
    kv_cache_of: Callable[[int, torch.device], KVCache],
    chunk: int,
    context: int,
    max_drafts: int,
    tp: TensorParallel,
) -> None:
    """Have the kernels of all steps compiled that this machine's ranks will record or warm up."""
    kv_cache = kv_cache_of(-(-context // config.page_size), META)
    # Where something does not divide evenly, the last rank's share is smaller.
    for rank in sorted({tp.rank, tp.size - 1}) if tp.is_first else [tp.rank]:
        one = replace(tp, rank=rank)
        models = without_memory(loaded, one, batch_invariant=config.batch_invariant)
        proposer = None if models.draft is None else NextNProposer(models.draft, kv_cache)
        compile_kernels(
            models,
            kv_cache,
            _decode_runner(config, models, proposer, kv_cache, context, max_drafts, one),
            sizes=[*padded_sizes(_max_recorded(config)), config.max_running_requests],
            draft_counts=_recorded_drafts(config, max_drafts),
            prompts=prompts_of_every_kind(min(chunk, context), config.max_running_requests),
        )


def _measured_plan(
    config: EngineConfig,
    loaded: LoadedModel,
    chunk: int,
    max_drafts: int,
    kv_cache_of: Callable[[int], KVCache],
    device: torch.device,
    tp: TensorParallel,
) -> MemoryPlan:
    """Compute the largest prompt chunk and the largest decode step once, over a small pool, and see what they take."""
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    num_rows = config.max_running_requests * (max_drafts + 1)
    num_tokens = chunk + num_rows
    context = config.context_length or loaded.model_config.max_position_embeddings
    # Where the context is shorter than a chunk, this is several prompts.
    spans = [(0, min(context, num_tokens - first)) for first in range(0, num_tokens, context)]
    ends = list(accumulate(-(-length // config.page_size) for _, length in spans))
    kv_cache = kv_cache_of(ends[-1])
    proposer = None if loaded.draft is None else NextNProposer(loaded.draft, kv_cache)

    def compute_chunk() -> None:
        tables = [range(first, end) for first, end in pairwise([0, *ends])]
        batch = make_extend_batch(spans, tables, config.page_size, device)
        hidden = loaded.target.forward(torch.zeros(num_tokens, dtype=torch.int64, device=device), batch, kv_cache)
        loaded.target.compute_logits(hidden[:num_rows])

    def decode() -> None:
        context_length = ends[0] * config.page_size
        runner = _decode_runner(config, loaded, proposer, kv_cache, context_length, max_drafts, tp)
        runner.rehearse(config.max_running_requests, max_drafts, is_greedy=False)  # takes the most

    of_sampling = SAMPLING_COPIES * num_rows * loaded.model_config.vocab_size * 4
    activations = max(_peak_bytes(compute_chunk, device), of_sampling)
    decoding = _peak_bytes(decode, device)
    free, total = torch.cuda.mem_get_info(device)  # last: by now libraries and kernels have taken what they take
    return MemoryPlan(
        total=total,
        fraction=config.mem_fraction_static,
        others=total - free - torch.cuda.memory_reserved(device),
        weights=weights,
        activations=activations,
        graphs=2 * decoding,  # the step that is tried before it is recorded, and the recordings
    )


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
