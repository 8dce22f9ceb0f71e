"""Token embedding, which every rank holds whole, and output head, of which each holds a share of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.cuts import vocabulary_of
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels import gpu
from nextn.kernels.fp8_dequantize import dequantize
from nextn.kernels.fp8_quantize import quantize_per_channel
from nextn.kernels.linear import PackedWeight, Weight, linear, pack_weight, store_weight
from nextn.layers.storage import Part, Slot


class Embedding(nn.Module):
    """weight: [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype)

    def weight_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.name}.weight", self.weight)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [T] int64. Returns [T, hidden_size]."""
        return self.weight.index_select(0, input_ids)


class OutputHead(nn.Module):
    """Hidden states to logits.

    weight: [tokens, hidden_size], the rank's share of the vocabulary; rows of the embedding where the two are tied
    becomes_fp8: whether it is quantized once loaded, with a scale per token: half the bytes to read
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str | None,
        vocab_size: int,
        tp: TensorParallel = SINGLE,
        *,
        becomes_fp8: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.vocab_size = vocab_size
        self.tp = tp
        self.becomes_fp8 = becomes_fp8
        self.weight = weight
        self.packed: Weight = PackedWeight(weight, weight.t(), None)

    @classmethod
    def untied(
        cls,
        vocab_size: int,
        hidden_size: int,
        name: str,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
        *,
        becomes_fp8: bool = False,
    ) -> OutputHead:
        num_tokens = len(vocabulary_of(vocab_size, tp.size, tp.rank))
        weight = torch.empty(num_tokens, hidden_size, dtype=dtype)
        return cls(weight, name, vocab_size, tp, becomes_fp8=becomes_fp8)

    @classmethod
    def tied(cls, embedding: Embedding, tp: TensorParallel = SINGLE) -> OutputHead:
        vocab_size = embedding.weight.shape[0]
        tokens = vocabulary_of(vocab_size, tp.size, tp.rank)
        return cls(embedding.weight[tokens.start : tokens.stop], None, vocab_size, tp)

    def fp8_copy(self) -> OutputHead:
        """Another head that becomes FP8, of the same tensor: for a draft, whose logits are proposals alone."""
        return OutputHead(self.weight, None, self.vocab_size, self.tp, becomes_fp8=True)

    def weight_slots(self) -> Iterator[Slot]:
        """Nothing where another's slot fills the same tensor: the embedding's when tied."""
        if self.name is not None:
            tokens = vocabulary_of(self.vocab_size, self.tp.size, self.tp.rank)
            yield Slot(f"{self.name}.weight", self.weight, Part(rows=tokens))

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded: lay the weight out for the device it is on."""
        codes, scale = quantize_per_channel(self.weight) if self.becomes_fp8 else (None, None)
        if gpu.suits(self.weight):
            stored = self.weight if codes is None else codes
            self.packed = store_weight(stored, None, scale, None, batch_invariant=batch_invariant)
        elif codes is None or scale is None:
            self.packed = pack_weight(self.weight)
        else:
            expanded = dequantize(codes, scale, None).to(self.weight.dtype)
            self.packed = pack_weight(expanded, codes=codes, scale=scale.view(-1))
        self.weight = self.packed.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden_size]. Returns logits [R, vocab_size] float32."""
        return self.tp.gather_columns(linear(hidden, self.packed, out_dtype=torch.float32), self.vocab_size)
