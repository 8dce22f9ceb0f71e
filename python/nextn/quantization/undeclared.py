"""FP8 tensors that no config describes: what they are, by the names and shapes of their scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

from nextn.errors import QuantizationError
from nextn.quantization.compressed_tensors import CompressedTensorsConfig
from nextn.quantization.fp8 import Fp8Config
from nextn.quantization.scheme import ActivationKind, LinearScheme, QuantizationConfig, SchemeKind
from nextn.quantization.tensors import FP8_DTYPE, SCALE_SUFFIXES

BLOCK = (128, 128)
"""Of every published checkpoint whose scales are per block."""


class StoredTensor(Protocol):
    """What a header says of a tensor. dtype: safetensors name."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def config_of_tensors(
    tensors: Mapping[str, StoredTensor], wanted: str | None, where: str, owner: str
) -> QuantizationConfig:
    """The config of a method that stores FP8 as these tensors are: of ``wanted``, if that is one.

    where: what asks, and owner: whose tensors they are, for messages
    Raises QuantizationError if no FP8 weight has a scale, or two have scales of different kinds.
    """
    found = dict(_schemes(tensors))
    if not found:
        raise QuantizationError(
            f"{where}: {owner} has float8_e4m3fn weights without a scale, which are no numbers; add the scales, or "
            "quantize the checkpoint again"
        )
    first, scheme = next(iter(found.items()))
    for name, other in found.items():
        if other != scheme:
            raise QuantizationError(
                f"{where}: {first} is {scheme.kind} with a {scheme.scale_suffix}, but {name} is {other.kind} with a "
                f"{other.scale_suffix}; declare them in config.json's quantization_config"
            )
    is_fp8 = scheme.scale_suffix == "weight_scale_inv" or (scheme.kind == "fp8_tensor" and wanted == "fp8")
    return Fp8Config(scheme, {}, where) if is_fp8 else CompressedTensorsConfig({"Linear": scheme}, {}, where)


def remedy(tensors: Mapping[str, StoredTensor], flag: str) -> str:
    """What to do about these tensors: declare them, or pass the flag with the method that they are in, if it is one."""
    declare = "declare them in config.json's quantization_config"
    try:
        method = config_of_tensors(tensors, None, flag, "the checkpoint").method
    except QuantizationError:
        return declare
    return f"{declare}, or pass {flag} {method}"


def _schemes(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, LinearScheme]]:
    """(module name, scheme) of every FP8 weight that has a scale."""
    for tensor_name, weight in tensors.items():
        name = tensor_name.removesuffix(".weight")
        suffix = next((suffix for suffix in SCALE_SUFFIXES if f"{name}.{suffix}" in tensors), None)
        if name == tensor_name or weight.dtype != FP8_DTYPE or not weight.shape or suffix is None:
            continue
        kind: SchemeKind = "fp8_block"
        activation: ActivationKind = "dynamic_group"
        num_scales = math.prod(tensors[f"{name}.{suffix}"].shape)
        if suffix == "weight_scale" and num_scales in (1, weight.shape[0]):
            kind = "fp8_tensor" if num_scales == 1 else "fp8_channel"
            activation = "static_tensor" if f"{name}.input_scale" in tensors else "dynamic_token"
        block = BLOCK if kind == "fp8_block" else None
        yield name, LinearScheme(kind, suffix, block, activation, source="its scales")
