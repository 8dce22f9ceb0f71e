"""A linear layer over one or several checkpoint modules, stored as the checkpoint stores it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nextn.kernels.linear import InputFormat, PackedWeight, Rows, Weight, linear
from nextn.layers.storage import Part, Shard, Slot, make_scales, make_weight, pack, weight_slots
from nextn.quantization.scheme import QuantizationConfig, scheme_of


class Linear(nn.Module):
    """y = x Wᵀ + b. ``shards`` are stacked along the output, so that q, k, v (or gate, up) are one product.

    Weights are plain tensors, not parameters: nothing trains here, and reading an attribute stays cheap.

    weight: [Σ rows, in_features]; FP8 codes until ``prepare``, where the scheme is quantized; the storage may be given
    input_format: how its activations should come; None for wide
    """

    def __init__(
        self,
        in_features: int,
        shards: Sequence[Shard],
        quant_config: QuantizationConfig | None,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shards = tuple(shards)
        self.dtype = dtype
        self.scheme = scheme_of(quant_config, [shard.name for shard in shards])
        self.weight = make_weight(shards, in_features, self.scheme, dtype) if weight is None else weight
        self.scales = make_scales(shards, in_features, self.scheme)
        rows = sum(shard.num_rows for shard in shards)
        self.bias = torch.empty(rows, dtype=dtype) if bias else None
        self.packed: Weight = PackedWeight(self.weight, self.weight.t(), self.bias)
        self.input_format: InputFormat | None = None

    def weight_slots(self) -> Iterator[Slot]:
        yield from weight_slots(self.shards, self.scheme, self.weight, self.scales)
        if self.bias is not None:
            parts = self.bias.split([shard.num_rows for shard in self.shards])
            for shard, part in zip(self.shards, parts, strict=True):
                yield Slot(f"{shard.name}.bias", part, Part(rows=shard.part.rows))

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded: on a CPU replace FP8 codes and scales by their product, and lay the weight out for it."""
        self.packed = pack(
            self.shards, self.scheme, self.weight, self.scales, self.dtype, self.bias, batch_invariant=batch_invariant
        )
        self.weight = self.packed.weight
        if isinstance(self.packed, PackedWeight):
            self.scales = None
        else:
            self.input_format = self.packed.input_format

    def forward(self, x: torch.Tensor | Rows, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: [T, in_features]; residual: [T, Σ rows]. Returns [T, Σ rows]."""
        return linear(x, self.packed, residual)
