"""The kernels of a model compiled side by side, before its first step would have them compiled one by one.

The model computes over tensors without memory (torch's device meta), where a launch only compiles. What a step needs
and this did not meet is compiled when it is launched.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn

from nextn.checkpoint.loader import LoadedModel
from nextn.distributed.parallel import TensorParallel
from nextn.execution.decode_runner import DecodeRunner
from nextn.kernels.gpu import compiling_in
from nextn.kernels.matmul_config import SMALL_M
from nextn.kernels.paged_attention_triton import SEQS_AT_ONCE, SHORT
from nextn.kernels.random_uniform import ACCEPT_STREAM, DRAFT_STREAM, FINAL_STREAM, random_uniform
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.layers.prepare import prepare_weights
from nextn.models.glm4_moe import Glm4MoeDecoderLayer, Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN

META = torch.device("meta")

NEXT_LENGTH, NEXT_LENGTH_IN_BATCH = 1.08, 1.5
"""The ratio of two prompts' lengths that are tried, one after the other: alone, and beside other sequences."""

Span = tuple[int, int]
"""New tokens of a sequence: the first one's position, and how many there are."""

logger = logging.getLogger(__name__)


def without_memory(loaded: LoadedModel, tp: TensorParallel, *, batch_invariant: bool) -> LoadedModel:
    """The same models over tensors without memory, with one layer of each kind."""
    given, draft = loaded.target, loaded.draft
    with META:
        target = Glm4MoeForCausalLM(given.config, given.quant_config, dtype=given.dtype, tp=tp)
        target.layers = nn.ModuleList(_one_of_each(target.layers))
        if draft is not None:
            draft = Glm4MoeForCausalLMNextN(
                draft.config,
                draft.quant_config,
                target=target,
                dtype=draft.dtype,
                has_own_head=draft.has_own_head,
                has_own_embedding=draft.has_own_embedding,
                has_fp8_head=draft.has_fp8_head,
                tp=tp,
            )
        for model in (target, draft):
            if model is not None:
                prepare_weights(model, batch_invariant=batch_invariant)
    return replace(loaded, target=target, draft=draft)


def _one_of_each(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The first of all layers whose tensors are alike in shape and type."""
    found: dict[tuple[object, ...], nn.Module] = {}
    for layer in layers:
        assert isinstance(layer, Glm4MoeDecoderLayer)
        found.setdefault(tuple((slot.view.shape, slot.view.dtype) for slot in layer.weight_slots()), layer)
    return list(found.values())


@torch.inference_mode()
def compile_kernels(
    models: LoadedModel,
    kv_cache: KVCache,
    runner: DecodeRunner,
    *,
    sizes: Sequence[int],
    draft_counts: Sequence[int],
    prompts: Iterable[list[Span]],
) -> None:
    """Compile what decode steps and prompts launch, on all of the machine's processors.

    models, kv_cache, runner: over tensors without memory
    sizes, draft_counts: of decode steps; prompts: what steps with prompts compute, sequence by sequence
    """
    started = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool, compiling_in(pool):
        for size in sizes:
            for num_drafts in draft_counts:
                for is_greedy in (False, True):
                    runner.rehearse(size, num_drafts, is_greedy=is_greedy)
        for spans in prompts:
            _compute_prompts(models, kv_cache, spans)
        for stream in (ACCEPT_STREAM, DRAFT_STREAM, FINAL_STREAM):
            random_uniform(_integers(1), _integers(1), stream)
    logger.info("kernels are compiled, in %.1f s", time.monotonic() - started)


def prompts_of_every_kind(max_prefill_tokens: int, max_seqs: int) -> Iterator[list[Span]]:
    """Steps with prompts: new tokens alone and behind a prefix, and so beside others that decode or are as short.

    Products are cut up by how many tokens a step has in all, attention by its longest sequence and by how many it has.
    """
    starts, most = (0, max_prefill_tokens), max_prefill_tokens + max_seqs
    # How many tiles a product has can decide how it is cut up.
    for num_tokens in sorted({*_series(most, NEXT_LENGTH), *range(SMALL_M, most, SMALL_M)}):
        for start in starts:
            yield [(start, num_tokens)]
    for num_seqs in _batch_sizes(max_seqs):
        for num_tokens in _series(max_prefill_tokens, NEXT_LENGTH_IN_BATCH):
            for start in starts:
                yield [(start, num_tokens), *[(start, 1)] * (num_seqs - 1)]
                if num_tokens <= SHORT:
                    yield [(start, num_tokens)] * num_seqs


def _batch_sizes(max_seqs: int) -> list[int]:
    """The least and the most sequences that attention's programs look through alike, above one."""
    least, sizes = 2, []
    for most in SEQS_AT_ONCE:
        sizes += [least, most]
        least = most + 1
    return sorted({min(size, max_seqs) for size in sizes} - {1})


def _series(most: int, ratio: float) -> Iterator[int]:
    """From 1 to ``most``, each at most ``ratio`` times the one before it."""
    n = 1
    while n < most:
        yield n
        n = max(n + 1, int(n * ratio))
    yield most


def _compute_prompts(models: LoadedModel, kv_cache: KVCache, spans: list[Span]) -> None:
    page_size, ids = kv_cache.page_size, _integers(sum(num_tokens for _, num_tokens in spans))
    pages = [range(-(-(first + num_tokens) // page_size)) for first, num_tokens in spans]
    batch = make_extend_batch(spans, pages, page_size, META)
    hidden = models.target.forward(ids, batch, kv_cache)
    models.target.compute_logits(hidden[-len(spans) :])
    if models.draft is not None:
        models.draft.write_kv(ids, hidden, batch.positions, batch.slot_mapping, kv_cache)


def _integers(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.int64, device=META)
