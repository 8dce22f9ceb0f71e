"""The draft's quantization: what the loader detected is kept, unless the user overrides it.

The override has three states, all the way from the flag: None (unset), "unquant", or a method's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nextn.errors import QuantizationError
from nextn.quantization.scheme import LinearScheme, QuantizationConfig
from nextn.quantization.tensors import FP8_DTYPE, CheckedQuantization
from nextn.quantization.undeclared import StoredTensor, config_of_tensors, remedy

FLAG = "--speculative-draft-model-quantization"


@dataclass(frozen=True)
class DraftQuantization:
    """The decision, and why.

    stored: how the tensors lie in the files
    config: what the draft's constructor gets: the same, unless FP8 is expanded (weight × scale) on load
    is_fp8: whether the layer computes with FP8 weights
    warning: for the log, where the user should know
    """

    stored: CheckedQuantization
    config: QuantizationConfig
    reason: str
    is_fp8: bool
    warning: str | None = None


@dataclass(frozen=True)
class Dequantized:
    """Every linear in the computing type: FP8 is expanded before it gets there. stored: how the files hold it."""

    stored: CheckedQuantization
    method: str = "unquantized"

    def scheme_for(self, shard_names: Sequence[str]) -> LinearScheme:
        kind = self.stored.scheme_for(shard_names).kind
        return LinearScheme("unquantized", source=f"{FLAG} unquant, from {kind}")

    def unmatched_ignores(self, modules: Collection[str]) -> list[str]:
        return self.stored.unmatched_ignores(modules)


def decide_draft_quantization(
    detected: QuantizationConfig | None, override: str | None, draft_tensors: Mapping[str, StoredTensor] | None
) -> DraftQuantization:
    """Apply the override to what was detected.

    detected: the config of the checkpoint that the draft comes from
    draft_tensors: the draft layer's, by name; None for dummy weights, which are what the config says
    Raises QuantizationError if a method is asked for that the tensors are not in.
    """
    dtypes = {name: tensor.dtype for name, tensor in (draft_tensors or {}).items()}
    has_fp8 = detected is not None if draft_tensors is None else FP8_DTYPE in dtypes.values()
    is_declared = detected is not None
    if override is not None and detected is None and has_fp8:
        detected = config_of_tensors(draft_tensors or {}, override, f"{FLAG} {override}", "the draft")
    checked = CheckedQuantization(detected, dtypes, undeclared=partial(remedy, draft_tensors or {}, FLAG))
    method = detected.method if detected is not None and has_fp8 else "unquantized"
    if override is None:
        return DraftQuantization(checked, checked, _detected_reason(detected, has_fp8), has_fp8)
    if override == "unquant":
        if not has_fp8:
            return DraftQuantization(checked, checked, f"unquantized: {FLAG} unquant, and no tensor is FP8", False)
        warning = f"{FLAG} unquant: the draft's FP8 weights are multiplied by their scales on load and kept unquantized"
        stored = replace(checked, decided_by=f"{FLAG} unquant: weight x scale on load")
        return DraftQuantization(stored, Dequantized(stored), f"dequantized on load: {FLAG} unquant", False, warning)
    if override != method:
        is_found = is_declared or not has_fp8
        instead = f"leave the flag out to use {method}" if is_found else f"pass {method}, which config.json leaves out"
        raise QuantizationError(
            f"{FLAG} {override}: the draft's tensors are {method}, which is not compatible; {instead}, or quantize the "
            f"draft as {override}"
        )
    by_flag = replace(checked, decided_by=f"{FLAG} {override}")
    return DraftQuantization(by_flag, by_flag, f"{method}: {FLAG} {override}", has_fp8)


def _detected_reason(detected: QuantizationConfig | None, has_fp8: bool) -> str:
    if detected is None:
        return "unquantized: nothing is declared"
    if not has_fp8:
        return f"unquantized: {detected.method} is declared, but no tensor is FP8"
    return f"{detected.method}, as detected"
