"""How much KV the pool gets."""

from __future__ import annotations

import os

import torch

from nextn.config.cuts import num_kv_heads_of
from nextn.config.model_config import ModelConfig
from nextn.errors import ConfigError
from nextn.layers.kv_cache import KVCache

CPU_KV_FRACTION = 0.25
"""Share of the machine's free memory that the KV pool may grow to on a CPU (pages are touched only when used)."""


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype, *, has_draft: bool, tp_size: int = 1) -> int:
    """Bytes on each rank of K and V that one token takes in all layers, and of the hidden state kept for the draft."""
    num_layers = config.num_hidden_layers + has_draft
    values = 2 * num_layers * num_kv_heads_of(config, tp_size) * config.head_dim + has_draft * config.hidden_size
    return values * dtype.itemsize


def num_pages_for(
    config: ModelConfig,
    *,
    has_draft: bool,
    dtype: torch.dtype,
    page_size: int,
    max_total_tokens: int | None,
    wanted_tokens: int,
    tp_size: int = 1,
    ranks_per_node: int = 1,
) -> int:
    """Pages in the KV pool: what the user fixed, else what ``wanted_tokens`` needs as far as memory allows.

    tp_size, ranks_per_node: ranks that share the heads, and the memory

    Raises ConfigError if the pool could not hold two pages.
    """
    tokens = max_total_tokens
    if tokens is None:
        free = int(_free_memory() * CPU_KV_FRACTION / ranks_per_node)
        affordable = free // kv_bytes_per_token(config, dtype, has_draft=has_draft, tp_size=tp_size)
        tokens = min(wanted_tokens, affordable)
    if tokens < 2 * page_size:
        raise ConfigError(
            f"--max-total-tokens: the KV pool would hold {tokens} tokens; expected at least two pages of "
            f"{page_size}; raise --max-total-tokens, lower --page-size, or free memory"
        )
    return tokens // page_size


def _free_memory() -> int:
    """Bytes of physical memory that are free or can be freed at once."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_kv_cache(
    config: ModelConfig,
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_size: int = 1,
) -> KVCache:
    """Zeroed K and V, each [num_layers, num_pages, page_size, KV heads of a rank, head_dim]."""
    shape = (num_layers, num_pages, page_size, num_kv_heads_of(config, tp_size), config.head_dim)
    return KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
