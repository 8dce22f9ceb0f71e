"""Logits to tokens, and acceptance, of as many sequences as there are tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.argmax import argmax
from nextn.kernels.penalties import LogitRules, adjust_logits_by_slot, count_tokens
from nextn.kernels.random_uniform import DRAFT_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.kernels.sampling_probs import sampling_probs
from nextn.kernels.verify import verify_chains, verify_greedy_chains

from tests.kernels.published.common import META, Call, of, scales

MAX_SEQS = 64


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    if tokens > MAX_SEQS:
        return
    vocab_size = config.vocab_size
    rules = LogitRules.for_slots(MAX_SEQS, vocab_size, max_bias=1024, max_stop_ids=136, device=META)
    ids, floats = of(tokens, dtype=torch.int64), scales(tokens)
    for num_drafts in (0, 3):
        rows = tokens * (num_drafts + 1)
        probs, drafts = scales(rows, vocab_size), of(tokens, num_drafts, dtype=torch.int64)
        chains = probs.view(tokens, num_drafts + 1, vocab_size)
        decided = of(tokens, num_drafts + 1, dtype=torch.int64)
        yield f"{num_drafts} drafts, greedy chains", lambda a=decided, d=drafts: verify_greedy_chains(a, d)
        yield f"{num_drafts} drafts, counts", lambda a=decided: count_tokens(rules.output_counts, ids, a)
        for q in (None, scales(tokens, num_drafts, vocab_size)):
            yield (
                f"{num_drafts} drafts, chains, {'certain' if q is None else 'drawn'}",
                lambda p=chains, q=q, d=drafts: verify_chains(p, q, d, ids, ids),
            )
        for case, logits, out in (
            ("logits adjusted in place", probs, probs),
            ("logits widened and adjusted", of(rows, vocab_size), None),
        ):
            yield (
                f"{num_drafts} drafts, {case}",
                lambda x=logits, out=out, d=drafts: adjust_logits_by_slot(x, rules, ids, ids, d, out=out),
            )
    for logits in (scales(tokens, vocab_size), of(tokens, vocab_size)):
        yield "argmax", lambda x=logits: argmax(x)
        for case, truncation in (
            ("whole", (None, None, None)),
            ("top-p", (None, floats, None)),
            ("top-k, top-p and min-p", (ids, floats, floats)),
        ):
            yield f"probabilities, {case}", lambda x=logits, rules=truncation: sampling_probs(x, floats, *rules)
    yield "draw", lambda: sample_tokens(scales(tokens, vocab_size), of(tokens, dtype=torch.float64))
    yield "random numbers", lambda: random_uniform(ids, ids, DRAFT_STREAM)
