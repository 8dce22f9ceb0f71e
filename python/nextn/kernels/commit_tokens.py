"""The end of a decode step: what was decided becomes known, in what is kept by slot.

Floor: a few bytes per sequence; limited by launches.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.penalties import count_tokens


def commit_tokens(
    decided: torch.Tensor,
    lengths: torch.Tensor,
    write: torch.Tensor,
    tokens: torch.Tensor,
    num_tokens: torch.Tensor,
    output_counts: torch.Tensor | None,
) -> None:
    """Append decided tokens, in place.

    decided: [S, n] int64, each sequence's new tokens, then NO_TOKEN
    lengths: [S] int64, how many tokens each had; write: [S] int64, its slot. Several may share one that nobody reads.
    tokens: [num_slots, width] int64, of which what is beyond num_tokens may be anything; num_tokens: [num_slots] int64
    output_counts: [num_slots, V] int32, how often each token was decided; None where nobody counts
    """
    num_seqs, num_columns = decided.shape
    width = tokens.shape[1]
    if gpu.suits(decided, tokens):
        if num_seqs:
            gpu.launch(
                _commit_sequences,
                (num_seqs,),
                decided.contiguous(),
                lengths,
                write,
                tokens,
                num_tokens,
                num_tokens if output_counts is None else output_counts,
                num_columns,
                width,
                0 if output_counts is None else output_counts.shape[1],
                num_warps=1,
                COUNTS=output_counts is not None,
                BLOCK=gpu.next_power_of_2(num_columns),
            )
        return
    places = (lengths[:, None] + torch.arange(num_columns, device=decided.device)).clamp(max=width - 1)
    tokens[write[:, None], places] = decided
    num_tokens[write] = lengths + (decided >= 0).sum(1)
    if output_counts is not None:
        count_tokens(output_counts, write, decided)


@jit(varying=("decided", "lengths", "write", "num_columns", "vocab_size"))
def _commit_sequences(  # type: ignore[no-untyped-def]
    decided,
    lengths,
    write,
    tokens,
    num_tokens,
    output_counts,
    num_columns,
    width,
    vocab_size,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per sequence."""
    wait_for_predecessor(EARLY)
    seq = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    token = tl.load(decided + seq * num_columns + column, mask=column < num_columns, other=-1)
    exists = token >= 0
    slot, length = tl.load(write + seq), tl.load(lengths + seq)
    tl.store(tokens + slot * width + length + column, token, mask=exists & (length + column < width))
    tl.store(num_tokens + slot, length + tl.sum(exists.to(tl.int64), 0))
    if COUNTS:
        tl.atomic_add(output_counts + slot * vocab_size + token, 1, mask=exists)
