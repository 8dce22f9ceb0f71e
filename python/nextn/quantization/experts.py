"""Which experts the kernels for GPUs take: they multiply all of a layer's as one stack."""

from __future__ import annotations

from nextn.quantization.scheme import LinearScheme

MIN_BLOCK_K = 32
"""The narrowest blocks of experts that the kernels for GPUs take."""


def why_not_on_gpu(name: str, w13: LinearScheme, w2: LinearScheme) -> str | None:
    """Why the kernels for GPUs do not take experts that are stored like this; None if they do. name: of one"""
    if (w13.is_quantized, w13.block, w13.quantizes_input) != (w2.is_quantized, w2.block, w2.quantizes_input):
        return (
            f"{name}.gate_proj: is {_described(w13)} and {name}.down_proj is {_described(w2)}; expected one kind for a "
            "layer's experts on a GPU; quantize the two alike, or use --device cpu"
        )
    if w13.block is not None and (w13.block[1] < MIN_BLOCK_K or w13.block[1] & (w13.block[1] - 1)):
        return (
            f"{name}.gate_proj: has a scale per {w13.block[1]} columns, expected a power of two from {MIN_BLOCK_K} on "
            "for a GPU; quantize with blocks of 128, or use --device cpu"
        )
    return None


def _described(scheme: LinearScheme) -> str:
    kind = scheme.kind if scheme.block is None else f"{scheme.kind} of {scheme.block[0]} x {scheme.block[1]}"
    return f"{kind}, weights only" if scheme.is_quantized and not scheme.quantizes_input else kind
