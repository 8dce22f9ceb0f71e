"""The first largest logit of each row.

Floor: one read of the logits; limited by memory, at few rows by launches.
"""

from __future__ import annotations

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.row_parts import index_of, largest_of_parts, packed_of_row


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first largest of each row.

    logits: [R, V] float32 or bfloat16
    Returns [R] int64.
    """
    if not gpu.suits(logits):
        return logits.argmax(-1)
    rows = logits.shape[0]
    logits = logits.contiguous()
    best = largest_of_parts(logits)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        parts = best.shape[1]
        gpu.launch(_first_largest, (rows,), best, out, parts, num_warps=1, PARTS=gpu.next_power_of_2(parts))
    return out


@jit
def _first_largest(best, out, parts, PARTS: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row, index_of(tl.max(packed_of_row(best, row, parts, PARTS), 0)))
