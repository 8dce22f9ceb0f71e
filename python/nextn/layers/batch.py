"""The one kind of batch: every sequence gets n ≥ 1 new tokens over the KV that is already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nextn.kernels.gpu import upload
from nextn.kernels.paged_attention import AttentionLayout, make_attention_layout


@dataclass(frozen=True)
class ExtendBatch:
    """Where the batch's T tokens stand, and what each may attend to. Shared by all layers of a step.

    positions: [T] int64
    slot_mapping: [T] int64, page · page_size + offset, where the token's KV goes
    layout: which tokens belong to which sequence, and where its keys are, for the attention kernel
    output_rows: [R] int64, the tokens whose output is read, if not all; the layout is of these, others only leave KV.
        For models of one layer.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    layout: AttentionLayout
    output_rows: torch.Tensor | None = None


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


def make_chain_batches(
    starts: Sequence[int],
    num_steps: int,
    page_tables: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device,
    *,
    first_key: int = 0,
) -> list[ExtendBatch]:
    """Lay out ``num_steps`` batches: one new token per sequence in each, at ``starts`` first and then one further.

    page_tables: per sequence its pages, enough for start + num_steps tokens
    """
    num_seqs = len(starts)
    positions = [start + step for step in range(num_steps) for start in starts]
    slots = [
        pages[p // page_size] * page_size + p % page_size
        for p, pages in zip(positions, [*page_tables] * num_steps, strict=True)
    ]
    both = upload(positions + slots, device=device).view(2, num_steps, num_seqs)
    last = make_attention_layout(
        [(start + num_steps - 1, 1) for start in starts], page_tables, page_size, device, first_key=first_key
    )
    # A single token's position is also where its sequence's new tokens start; the last step's pages serve all.
    return [ExtendBatch(at, where, replace(last, starts=at)) for at, where in zip(*both.unbind(), strict=True)]


def slots_of(positions: range, pages: Sequence[int], page_size: int) -> list[int]:
    """page · page_size + offset of a sequence's positions. pages: its pages, enough for them."""
    slots: list[int] = []
    for page in range(positions.start // page_size, -(-positions.stop // page_size)):
        moved = (pages[page] - page) * page_size  # slots of one page are adjacent
        slots += range(
            moved + max(positions.start, page * page_size), moved + min(positions.stop, (page + 1) * page_size)
        )
    return slots


def place_tokens(
    spans: Sequence[tuple[int, int]], page_tables: Sequence[Sequence[int]], page_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions and slot_mapping of a batch, [T] int64 each; arguments as for ``make_extend_batch``."""
    positions: list[int] = []
    slots: list[int] = []
    for (start, length), pages in zip(spans, page_tables, strict=True):
        positions += range(start, start + length)
        slots += slots_of(range(start, start + length), pages, page_size)
    both = upload(positions + slots, device=device)
    return both[: len(positions)], both[len(positions) :]
