"""The tensors are the truth: what the config says of a linear, checked against what the checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nextn.errors import QuantizationError
from nextn.quantization.names import agreed
from nextn.quantization.scheme import LinearScheme, QuantizationConfig, scheme_of

FP8_DTYPE = "F8_E4M3"
SCALE_SUFFIXES = ("weight_scale", "weight_scale_inv")


@dataclass(frozen=True)
class CheckedQuantization:
    """A quantization config that answers for one checkpoint: every answer agrees with the tensors, or is an error.

    declared: what config.json says; None is unquantized
    dtypes: safetensors dtype of every tensor of the checkpoint, by name
    remedy: what to do about FP8 codes that cannot be scaled
    undeclared: says what to do about FP8 codes where nothing is declared
    decided_by: the flag that chose the quantized linears' scheme; None where config.json did
    """

    declared: QuantizationConfig | None
    dtypes: Mapping[str, str]
    remedy: str = "add the scale, or quantize the checkpoint again"
    undeclared: Callable[[], str] = lambda: "declare them in config.json's quantization_config"
    decided_by: str | None = None

    @property
    def method(self) -> str:
        return self.declared.method if self.declared is not None else "unquantized"

    def scheme_for(self, shard_names: Sequence[str]) -> LinearScheme:
        """As QuantizationConfig. A module that is declared FP8 but stored in BF16 without scales is BF16."""
        scheme = agreed(shard_names, [self._check(name, scheme_of(self.declared, [name])) for name in shard_names])
        return replace(scheme, source=self.decided_by) if self.decided_by and scheme.is_quantized else scheme

    def unmatched_ignores(self, modules: Collection[str]) -> list[str]:
        return self.declared.unmatched_ignores(modules) if self.declared is not None else []

    def _check(self, name: str, declared: LinearScheme) -> LinearScheme:
        dtype = self.dtypes.get(f"{name}.weight")
        if dtype is None:
            return declared  # the loader reports what is missing
        scales = [suffix for suffix in SCALE_SUFFIXES if f"{name}.{suffix}" in self.dtypes]
        if dtype.startswith("F8_") and dtype != FP8_DTYPE:
            raise QuantizationError(f"{name}.weight: found {dtype}, expected {FP8_DTYPE}; {self.remedy}")
        if dtype == FP8_DTYPE and not declared.is_quantized:
            remedy = self.undeclared() if self.declared is None else "correct the quantization config"
            raise QuantizationError(
                f"{name}.weight: holds float8_e4m3fn codes, but it is declared unquantized ({declared.source}); read "
                f"as numbers they would be garbage: {remedy}"
            )
        if dtype == FP8_DTYPE and declared.scale_suffix not in scales:
            found = f"its scale is named {scales[0]}" if scales else f"it has no {declared.scale_suffix}"
            raise QuantizationError(f"{name}: float8_e4m3fn weight, but {found}; {self.remedy}")
        if dtype != FP8_DTYPE and scales:
            raise QuantizationError(
                f"{name}: {dtype} weight with a {scales[0]} that nothing would apply; remove the scale or quantize the "
                "weight"
            )
        if dtype != FP8_DTYPE and declared.is_quantized:
            return LinearScheme("unquantized", source=f"the tensors are {dtype} without scales")
        return declared
