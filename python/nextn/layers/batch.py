"""The one kind of batch: every sequence gets n ≥ 1 new tokens over the KV that is already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nextn.kernels.paged_attention import AttentionLayout, make_attention_layout


@dataclass(frozen=True)
class ExtendBatch:
    """Where the batch's T tokens stand, and what each may attend to. Shared by all layers of a step.

    positions: [T] int64
    slot_mapping: [T] int64, page · page_size + offset, where the token's KV goes
    layout: which tokens belong to which sequence, and where its keys are, for the attention kernel
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    layout: AttentionLayout


def make_extend_batch(
    spans: Sequence[tuple[int, int]],
    page_tables: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device,
    *,
    first_key: int = 0,
) -> ExtendBatch:
    """Lay out a batch.

    spans: per sequence the first new position and how many follow from it, itself included
    page_tables: per sequence its pages, enough for start + length tokens
    first_key: the first position that may be attended to (the draft layer has no entry at 0)
    """
    positions, slot_mapping = place_tokens(spans, page_tables, page_size, device)
    return ExtendBatch(
        positions=positions,
        slot_mapping=slot_mapping,
        layout=make_attention_layout(spans, page_tables, page_size, device, first_key=first_key),
    )


def place_tokens(
    spans: Sequence[tuple[int, int]], page_tables: Sequence[Sequence[int]], page_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions and slot_mapping of a batch, [T] int64 each; arguments as for ``make_extend_batch``."""
    positions: list[int] = []
    slots: list[int] = []
    for (start, length), pages in zip(spans, page_tables, strict=True):
        span = range(start, start + length)
        positions += span
        slots += [pages[p // page_size] * page_size + p % page_size for p in span]
    both = torch.tensor(positions + slots, device=device)
    return both[: len(positions)], both[len(positions) :]
