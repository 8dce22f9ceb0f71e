"""A decode step's bookkeeping, of as many sequences as there are tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nextn.config.model_config import ModelConfig
from nextn.kernels.commit_tokens import commit_tokens
from nextn.kernels.step_layout import lay_out_step, rules_of_rows

from tests.kernels.published.common import META, Call, of, scales

MAX_SEQS, MAX_DRAFTS, PAGE_SIZE = 64, 5, 64


def launches(config: ModelConfig, tokens: int, has_fp8_units: bool) -> Iterator[Call]:
    if tokens > MAX_SEQS:
        return
    num_rows, context = MAX_SEQS + 1, config.max_position_embeddings
    width = context + 2 * (MAX_DRAFTS + 1)
    kept, page_table = of(num_rows, width, dtype=torch.int64), of(num_rows, width // PAGE_SIZE + 1, dtype=torch.int64)
    by_slot, of_seqs = of(num_rows, dtype=torch.int64), of(tokens, dtype=torch.int64)
    counts = torch.empty(num_rows, config.vocab_size, dtype=torch.int32, device=META)
    rules = (scales(num_rows), by_slot, scales(num_rows), scales(num_rows))
    for num_drafts in (0, 1, 3, 5):
        yield (
            f"{num_drafts} drafts, layout",
            lambda k=num_drafts: lay_out_step(
                *(of_seqs, of_seqs, of_seqs, kept, by_slot, by_slot, by_slot, page_table),
                num_drafts=k,
                num_known=MAX_DRAFTS + 2 if k else 0,
                page_size=PAGE_SIZE,
                context_length=context,
                scratch_page=4096,
            ),
        )
        decided = of(tokens, num_drafts + 1, dtype=torch.int64)
        for output_counts in (None, counts):
            yield (
                f"{num_drafts} drafts, commit",
                lambda a=decided, c=output_counts: commit_tokens(a, of_seqs, of_seqs, kept, by_slot, c),
            )
        yield f"{num_drafts} drafts, rules", lambda k=num_drafts: rules_of_rows(of_seqs, k + 1, *rules)
