"""What each rank holds: its part of the models, and its part of the KV pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import TensorParallel
from nextn.execution.memory import make_kv_cache, num_pages_for
from nextn.layers.kv_cache import KVCache
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.proposer import NextNProposer


@dataclass(frozen=True)
class ModelShard:
    """num_pages: in the KV pool, the same on every rank; context_length: most tokens of one request"""

    loaded: LoadedModel
    kv_cache: KVCache
    num_pages: int
    context_length: int
    cycle: SpeculativeCycle


def load_shard(config: EngineConfig, tp: TensorParallel) -> ModelShard:
    """Load the checkpoint and allocate the KV pool.

    Raises CheckpointError or ConfigError, whose message says what to change.
    """
    device = device_of(tp.local_rank)
    loaded = load_model(config, device=device, dtype=_dtype(config.dtype), want_draft=config.wants_draft, tp=tp)
    model_config, draft = loaded.model_config, loaded.draft
    context = config.context_length or model_config.max_position_embeddings
    dtype = loaded.target.dtype
    num_pages = tp.least(
        num_pages_for(
            model_config,
            has_draft=draft is not None,
            dtype=dtype,
            page_size=config.page_size,
            max_total_tokens=config.max_total_tokens,
            wanted_tokens=config.max_running_requests * (context + config.page_size),
            tp_size=tp.size,
            ranks_per_node=tp.ranks_per_node,
        )
    )
    kv_cache = make_kv_cache(
        model_config,
        num_layers=model_config.num_hidden_layers + (draft is not None),
        num_pages=num_pages,
        page_size=config.page_size,
        dtype=dtype,
        device=device,
        tp_size=tp.size,
    )
    proposer = None if draft is None else NextNProposer(draft, kv_cache)
    cycle = SpeculativeCycle(loaded.target, proposer, kv_cache, page_size=config.page_size, tp=tp)
    return ModelShard(loaded, kv_cache, num_pages, min(context, num_pages * config.page_size), cycle)


def device_of(local_rank: int) -> torch.device:
    """Where a rank computes."""
    return torch.device("cpu")


def _dtype(name: str) -> torch.dtype:
    """The computing type on CPU."""
    return {
        "auto": torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]
