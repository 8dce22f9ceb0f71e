"""Token embedding and output head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.kernels import gpu
from nextn.kernels.linear import PackedWeight, Weight, linear, pack_weight, store_weight
from nextn.layers.storage import Slot


class Embedding(nn.Module):
    """weight: [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype)

    def weight_slots(self) -> Iterator[Slot]:
        yield f"{self.name}.weight", self.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [T] int64. Returns [T, hidden_size]."""
        return self.weight.index_select(0, input_ids)


class OutputHead(nn.Module):
    """Hidden states to logits. weight: [vocab_size, hidden_size], the embedding's own where the two are tied."""

    def __init__(self, weight: torch.Tensor, name: str | None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.packed: Weight = PackedWeight(weight, weight.t(), None)

    @classmethod
    def untied(cls, vocab_size: int, hidden_size: int, name: str, dtype: torch.dtype) -> OutputHead:
        return cls(torch.empty(vocab_size, hidden_size, dtype=dtype), name)

    def weight_slots(self) -> Iterator[Slot]:
        """Nothing when tied: the embedding's slot fills the same tensor."""
        if self.name is not None:
            yield f"{self.name}.weight", self.weight

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded: lay the weight out for the device it is on."""
        if gpu.suits(self.weight):
            self.packed = store_weight(self.weight, None, None, None, batch_invariant=batch_invariant)
        else:
            self.packed = pack_weight(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden_size]. Returns logits [R, vocab_size] float32."""
        return linear(hidden, self.packed, out_dtype=torch.float32)
