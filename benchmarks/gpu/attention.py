"""Attention of decode steps over paged KV, in the shape that all GLM-4.x models share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.paged_attention import AttentionLayout, paged_attention

from benchmarks.gpu.floors import kv_bytes
from benchmarks.gpu.place import Place, attempt, check, poisoned
from benchmarks.gpu.row import Goal, Outcome, Row
from benchmarks.gpu.shapes import config_of

CASES = ((16, 4096), (16, 32768), (64, 4096), (64, 32768))
"""(sequences, tokens of each)"""
PAGE_SIZE = 16
GOAL = Goal(at_least=0.8)
TOLERANCE = 0.05
"""Of the root mean square: bfloat16 rounds by up to 0.02 of it, and so are probabilities rounded."""


def measure(place: Place) -> Iterator[Outcome]:
    cases = CASES if not place.is_rehearsal else ((2, 64),)
    with place.on_device():
        for batch, context in cases:
            for dtype in (torch.bfloat16, FP8):
                place.check_time(4, f"the cases before {batch} × {context}")
                what = f"decode attention, {batch} × {context}, {dtype}"
                yield attempt(what, partial(_row, place, batch, context, dtype))


def _row(place: Place, batch: int, context: int, dtype: torch.dtype) -> Row:
    config = config_of("glm-4.5-air", place)
    device, pages = place.device, context // PAGE_SIZE
    shape = (batch * pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    k_cache, v_cache = (torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    num_copies = place.copies_for(2 * k_cache.numel() * k_cache.itemsize)
    caches = [(k_cache, v_cache), *((k_cache.clone(), v_cache.clone()) for _ in range(num_copies - 1))]
    layout = AttentionLayout(
        torch.full((batch,), context - 1, device=device),
        torch.arange(batch + 1, device=device),
        torch.randperm(batch * pages, device=device).view(batch, pages),
        PAGE_SIZE,
        0,
        1,
    )
    q = torch.randn(batch, config.num_attention_heads, config.head_dim, device=device, dtype=torch.bfloat16)
    scale = config.head_dim**-0.5
    with poisoned():
        got = paged_attention(q, k_cache, v_cache, layout, scale)
    check(got, exact(q, k_cache, v_cache, layout, scale), TOLERANCE, f"attention, {batch} × {context}, {dtype}")
    seconds = place.seconds_per_call([partial(paged_attention, q, k, v, layout, scale) for k, v in caches])
    speed = kv_bytes(config, batch * context, dtype.itemsize) / seconds
    return Row(
        f"decode attention, batch {batch}, {context} tokens, {'FP8' if dtype == FP8 else 'BF16'} KV",
        GOAL,
        speed / 1e9,
        "GB/s",
        speed / place.copy_bandwidth,
        place.copy_bandwidth / 1e9,
        "copy bandwidth",
        f"{1e6 * seconds:.0f} µs per layer",
    )


def exact(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layout: AttentionLayout, scale: float
) -> torch.Tensor:
    """The same in float64, for one new token per sequence and pages that are all full. Returns [S, num_heads, D]."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    num_kv_heads = k_cache.shape[2]
    for seq, pages in enumerate(layout.page_table):
        keys, values = (cache[pages].flatten(0, 1).transpose(0, 1).double() for cache in (k_cache, v_cache))
        queries = q[seq].double().view(num_kv_heads, -1, q.shape[2])
        probs = (queries @ keys.transpose(1, 2) * scale).softmax(-1)
        out[seq] = (probs @ values).view(q.shape[1:])
    return out
