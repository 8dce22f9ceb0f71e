"""RMSNorm with a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nextn.distributed.parallel import TensorParallel
from nextn.kernels.linear import InputFormat, Rows
from nextn.kernels.moe_combine import ExpertTerms
from nextn.kernels.rms_norm import NormedRows, norm_quantize, rms_norm
from nextn.layers.storage import Slot


@dataclass(frozen=True)
class Summands:
    """Two of [T, H], in one type: what a part of all ranks made, and what came before it."""

    term: torch.Tensor
    residual: torch.Tensor


Stream = torch.Tensor | ExpertTerms | Summands
"""The residual stream, or what it is the sum of."""


def sum_over_ranks(
    tp: TensorParallel, term: Callable[[torch.Tensor | None], torch.Tensor], residual: torch.Tensor | None
) -> Stream:
    """residual + every rank's term. The residual is not exchanged: sums between GPUs round to its type at every rank.

    term: computes this rank's, plus what it is given; all of [T, H]
    """
    if tp.size == 1 or residual is None:
        return tp.all_reduce(term(residual))
    return Summands(tp.all_reduce(term(None)), residual)


class RMSNorm(nn.Module):
    """weight: [size]; the published weights multiply as they are (they are not stored shifted by one)."""

    def __init__(self, size: int, eps: float, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype)

    def weight_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.name}.weight", self.weight)

    def forward(self, x: Stream) -> torch.Tensor:
        """x: [..., size]. Returns the same shape."""
        if isinstance(x, torch.Tensor):
            return rms_norm(x, self.weight, self.eps)
        return self._add_and_norm(x, quantize=False, group_size=None).normed

    def forward_for(self, x: Stream, wanted: InputFormat | None) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """In one pass over the residual stream: its sum, and its norm as a linear wants its input.

        x: [T, size]. Returns x [T, size], summed, and ``forward`` of it.
        """
        if wanted is None and isinstance(x, torch.Tensor):
            return x, rms_norm(x, self.weight, self.eps)
        size = None if wanted is None else wanted.group_size
        rows = self._add_and_norm(x, quantize=wanted is not None, group_size=size)
        if wanted is None:
            return rows.sum, rows.normed
        assert rows.q is not None, "it was asked for"
        assert rows.scale is not None, "it was asked for"
        return rows.sum, Rows(rows.q, rows.scale, rows.normed, rows.sum.dtype)

    def _add_and_norm(self, x: Stream, *, quantize: bool, group_size: int | None) -> NormedRows:
        x, residual = (x.term, x.residual) if isinstance(x, Summands) else (x, None)
        return norm_quantize(x, self.weight, self.eps, residual=residual, quantize=quantize, group_size=group_size)
