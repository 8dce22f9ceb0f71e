"""The draft's quantization: what the loader detected is kept, unless the user overrides it.

The override has three states, all the way from the flag: None (unset), "unquant", or a method's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nextn.errors import QuantizationError
from nextn.quantization.scheme import QuantizationConfig
from nextn.quantization.tensors import FP8_DTYPE, CheckedQuantization

FLAG = "--speculative-draft-model-quantization"


@dataclass(frozen=True)
class DraftQuantization:
    """The decision, and why.

    config: what the draft's constructor gets
    dequantize: expand weight × scale on load, also where FP8 could be computed with
    warning: for the log, where the user should know
    """

    config: QuantizationConfig
    dequantize: bool
    reason: str
    warning: str | None = None


def decide_draft_quantization(
    detected: QuantizationConfig | None, override: str | None, draft_dtypes: Mapping[str, str]
) -> DraftQuantization:
    """Apply the override to what was detected.

    detected: the config of the checkpoint that the draft comes from
    draft_dtypes: safetensors dtype of each of the draft layer's tensors, by name
    Raises QuantizationError if a method is asked for that the tensors are not in.
    """
    has_fp8 = any(dtype == FP8_DTYPE for dtype in draft_dtypes.values())
    checked = CheckedQuantization(detected, draft_dtypes)
    if override is None:
        if detected is None:
            return DraftQuantization(checked, False, "unquantized: nothing is declared")
        if not has_fp8:
            return DraftQuantization(
                checked, False, f"unquantized: {detected.method} is declared, but no tensor is FP8"
            )
        return DraftQuantization(checked, False, f"{detected.method}, as detected")
    if override == "unquant":
        if not has_fp8:
            return DraftQuantization(checked, False, f"unquantized: {FLAG} unquant, and no tensor is FP8")
        warning = f"{FLAG} unquant: the draft's FP8 weights are multiplied by their scales on load and kept unquantized"
        return DraftQuantization(checked, True, f"dequantized on load: {FLAG} unquant", warning)
    method = detected.method if detected is not None and has_fp8 else "unquantized"
    if override != method:
        raise QuantizationError(
            f"{FLAG} {override}: the draft's tensors are {method}, which is not compatible; leave the flag away to use "
            f"{method}, or quantize the draft as {override}"
        )
    return DraftQuantization(checked, False, f"{method}: {FLAG} {override}")
