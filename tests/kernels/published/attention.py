"""Attention over paged KV: decoding and verifying at several batch sizes, and prompts; a draft has no key at 0."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.attention_layout import AttentionLayout
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.paged_attention import paged_attention, paged_attention_quantized
from nextn.kernels.rope_and_cache import Rotation, rope_and_cache
from nextn.kernels.rotary import RotaryTable

from tests.kernels.published.common import Call, of

PAGE_SIZE, NUM_PAGES = 16, 1 << 14
QUERY_LENS = {1: (1,), 4: (4,), 16: (1,), 64: (1, 4, 64), 512: (6, 512), 8192: (512, 8192)}
"""By the batch's number of tokens, the most new tokens of a sequence."""


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    o_proj = of(config.hidden_size, heads * dim, dtype=FP8 if has_fp8_units else torch.bfloat16)
    for kv_dtype in (torch.bfloat16, FP8):
        k, v = (of(NUM_PAGES, PAGE_SIZE, kv_heads, dim, dtype=kv_dtype) for _ in range(2))
        for query_len in QUERY_LENS[tokens]:
            for max_pages in (64, 2048):
                for first_key, invariant in product((0, 1), (False, True)):
                    # Heads are quantized where the product that comes next takes that.
                    attend = paged_attention_quantized if has_fp8_units else paged_attention
                    layout = _layout(max(tokens // query_len, 1), max_pages, first_key, query_len)
                    yield (
                        f"attention from key {first_key}, {query_len} per sequence, {max_pages} pages of {kv_dtype}, "
                        f"batch_invariant {invariant}",
                        lambda attend=attend, k=k, v=v, layout=layout, invariant=invariant: attend(
                            of(tokens, heads, dim),
                            k,
                            v,
                            layout,
                            dim**-0.5,
                            next_weight=o_proj,
                            batch_invariant=invariant,
                        ),
                    )
        table = RotaryTable(
            *(of(config.max_position_embeddings, dim, dtype=torch.float32) for _ in range(2)),
            of(dim, dtype=torch.int64),
            dim // 2,
        )
        rotation = Rotation(table, of(tokens, dtype=torch.int64), torch.bfloat16)
        for num_queries in (heads, 0):
            yield (
                f"rotary and cache of {kv_dtype}, {num_queries} query heads",
                lambda k=k, v=v, n=num_queries, rotation=rotation: rope_and_cache(
                    of(tokens, n + 2 * kv_heads, dim),
                    of(2, dim) if config.use_qk_norm else None,
                    1e-5,
                    rotation,
                    of(tokens, dtype=torch.int64),
                    k,
                    v,
                ),
            )


def _layout(num_seqs: int, max_pages: int, first_key: int, query_len: int) -> AttentionLayout:
    starts, cu_seqlens_q, pages = (
        of(*shape, dtype=torch.int64) for shape in ((num_seqs,), (num_seqs + 1,), (num_seqs, max_pages))
    )
    return AttentionLayout(starts, cu_seqlens_q, pages, PAGE_SIZE, first_key, query_len)
