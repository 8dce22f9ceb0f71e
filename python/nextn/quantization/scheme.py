"""How the weights of one linear are stored, and who decides it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

SchemeKind = Literal["unquantized", "fp8_channel", "fp8_tensor", "fp8_block"]
ActivationKind = Literal["none", "dynamic_token", "dynamic_group", "static_tensor"]


INPUT_NOTES: dict[ActivationKind, str] = {
    "none": "; weights only, activations stay wide",
    "static_tensor": "; its input scales are not used: activations are scaled by the token",
}
"""For the load report, where activations are not treated as the reader of a config would expect."""


@dataclass(frozen=True)
class LinearScheme:
    """Storage of a linear's weight [out, in] in the checkpoint; x ≈ q · scale (compressed-tensors, DeepSeek-V3).

    kind: "fp8_channel" has a scale [out, 1]; "fp8_tensor" a scale of one element ([1] or []);
        "fp8_block" a scale [⌈out / block_out⌉, ⌈in / block_in⌉]; "unquantized" none
    scale_suffix: "weight_scale" or "weight_scale_inv" (both multiply); None when unquantized
    block: (block_out, block_in) for "fp8_block"
    activation: how activations are quantized where the hardware multiplies FP8 × FP8;
        "static_tensor" has a tensor `input_scale` beside the weight, "dynamic_group" groups of block_in per token
    source: where the decision came from, in words for the load report
    """

    kind: SchemeKind
    scale_suffix: str | None = None
    block: tuple[int, int] | None = None
    activation: ActivationKind = "none"
    source: str = ""

    @property
    def is_quantized(self) -> bool:
        return self.kind != "unquantized"

    @property
    def quantizes_input(self) -> bool:
        """Whether activations are quantized too: by the token or group, even where they have a static scale."""
        return self.is_quantized and self.activation != "none"


UNQUANTIZED = LinearScheme("unquantized", source="no quantization config")


class QuantizationConfig(Protocol):
    """What a model's constructor asks about each of its linears."""

    @property
    def method(self) -> str:
        """The name that ``--quantization`` knows: "compressed-tensors" or "fp8"."""

    def scheme_for(self, shard_names: Sequence[str]) -> LinearScheme:
        """The scheme of a (possibly fused) linear made of these checkpoint modules, e.g. the three of q, k, v.

        shard_names: checkpoint module names without ".weight", such as "model.layers.3.self_attn.q_proj"
        Raises QuantizationError if the shards disagree.
        """

    def unmatched_ignores(self, modules: Collection[str]) -> list[str]:
        """Entries of the list of excluded modules that name none of these modules, each with where it stands."""


def scheme_of(quant_config: QuantizationConfig | None, shard_names: Sequence[str]) -> LinearScheme:
    """The scheme of a linear made of these checkpoint modules; unquantized without a config."""
    return UNQUANTIZED if quant_config is None else quant_config.scheme_for(shard_names)
