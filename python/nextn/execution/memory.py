"""How much KV the pool gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nextn.config.cuts import num_kv_heads_of
from nextn.config.model_config import ModelConfig
from nextn.errors import ConfigError
from nextn.layers.kv_cache import KVCache

CPU_KV_FRACTION = 0.25
"""Share of the machine's free memory that the KV pool may grow to on a CPU (pages are touched only when used)."""


def kv_bytes_per_token(
    config: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype, *, has_draft: bool, tp_size: int = 1
) -> int:
    """Bytes on each rank of K and V that one token takes in all layers, and of the hidden state kept for the draft.

    dtype: of hidden states; kv_dtype: of keys and values
    """
    num_layers = config.num_hidden_layers + has_draft
    of_kv = 2 * num_layers * num_kv_heads_of(config, tp_size) * config.head_dim * kv_dtype.itemsize
    return of_kv + has_draft * config.hidden_size * dtype.itemsize


def num_pages_for(
    *,
    bytes_per_token: int,
    page_size: int,
    max_total_tokens: int | None,
    wanted_tokens: int,
    free_bytes: int,
    all_bytes: int,
) -> int:
    """Pages in the KV pool: what the user fixed, else what ``wanted_tokens`` needs as far as memory allows.

    free_bytes: what the pool may take, where the user fixed nothing; all_bytes: what the device has
    Raises ConfigError if the pool could not hold two pages, or the device could not hold the pool.
    """
    tokens = max_total_tokens
    if tokens is None:
        tokens = min(wanted_tokens, max(free_bytes, 0) // bytes_per_token)
    elif tokens * bytes_per_token > all_bytes:
        raise ConfigError(
            f"--max-total-tokens: found {tokens}, whose KV takes {_gib(tokens * bytes_per_token)} of the "
            f"{_gib(all_bytes)} there are; lower it, or leave it out for as many as fit"
        )
    if tokens < 2 * page_size:
        raise ConfigError(
            f"--max-total-tokens: the KV pool would hold {tokens} tokens; expected at least two pages of "
            f"{page_size}; raise --max-total-tokens, lower --page-size, or free memory"
        )
    return tokens // page_size


def free_for_kv_on_cpu() -> int:
    """Bytes of physical memory that the KV pool may take: a share of what is free or can be freed at once."""
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_KV_FRACTION)


def memory_of_cpu() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def out_of_memory_means(advice: str) -> Iterator[None]:
    """Where a GPU's memory is not enough, raises ConfigError with what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"--device cuda: the GPU's memory is not enough; {advice}: {error}") from error


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
    """Zeroed K and V, each [num_layers, num_pages + 1, page_size, KV heads of a rank, head_dim].

    The last page is a scratch page: rows that only fill a batch up write there.
    """
    shape = (num_layers, num_pages + 1, page_size, num_kv_heads_of(config, tp_size), config.head_dim)
    return KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


@dataclass(frozen=True)
class MemoryPlan:
    """What a GPU's memory is used for, in bytes.

    usable: total · mem_fraction_static; others: what other programs hold of the GPU
    weights: of target and draft; activations: the most that computing a prompt chunk takes; graphs: the most that a
        decode step takes, which recordings keep
    """

    total: int
    fraction: float
    others: int
    weights: int
    activations: int
    graphs: int

    @property
    def usable(self) -> int:
        return int(self.total * self.fraction)

    @property
    def kv(self) -> int:
        """What is left for KV; below zero where the rest does not fit."""
        return self.usable - self.others - self.weights - self.activations - self.graphs

    def check(self, kv_bytes_per_token: int, needed_tokens: int) -> None:
        """Raises ConfigError if there is no room for ``needed_tokens`` tokens, with what to change."""
        needed = kv_bytes_per_token * needed_tokens
        if self.kv >= needed:
            return
        raise ConfigError(
            f"--mem-fraction-static: {self.fraction:g} of {_gib(self.total)} leaves {_gib(self.kv)} for KV, expected "
            f"at least {_gib(needed)} for {needed_tokens} tokens\n{self.as_table()}\n"
            "raise --mem-fraction-static (at most 0.99), use --kv-cache-dtype fp8_e4m3, lower --chunked-prefill-size, "
            "--cuda-graph-max-bs or --max-running-requests, or add GPUs with --tp-size"
        )

    def as_table(self) -> str:
        parts = [
            ("weights", self.weights),
            ("activations of a prompt chunk", self.activations),
            ("CUDA graphs of decode steps", self.graphs),
            ("other programs", self.others),
            ("KV pool", max(self.kv, 0)),
            (f"kept free (1 - {self.fraction:g})", self.total - self.usable),
        ]
        rows = [f"  {name:<32}{_gib(size):>12}{size / self.total:>8.1%}" for name, size in parts]
        return "\n".join([f"GPU memory: {_gib(self.total)}", *rows])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
