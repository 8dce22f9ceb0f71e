"""Which quantization a checkpoint declares."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextn.errors import QuantizationError
from nextn.quantization.compressed_tensors import CompressedTensorsConfig
from nextn.quantization.fp8 import Fp8Config
from nextn.quantization.names import entry_list
from nextn.quantization.scheme import INPUT_NOTES, ActivationKind, LinearScheme, QuantizationConfig, SchemeKind

METHODS = ("compressed-tensors", "fp8")
MODELOPT: Mapping[str, tuple[SchemeKind, ActivationKind]] = {
    "FP8": ("fp8_tensor", "static_tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "dynamic_token"),
}
"""What NVIDIA ModelOpt's algorithms store."""


def detect_quantization(folder: Path, declared: Mapping[str, Any] | None) -> QuantizationConfig | None:
    """The quantization config of a checkpoint; None where it declares none.

    declared: ``quantization_config`` or ``compression_config`` of config.json; without it, ``hf_quant_config.json``
    Raises QuantizationError for methods that are not supported, by name.
    """
    where = "config.json"
    extra = folder / "hf_quant_config.json"
    if declared is None and os.path.lexists(extra):
        where = extra.name
        try:
            declared = json.loads(extra.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise QuantizationError(f"{extra} cannot be read: {error}") from None
    if declared is None:
        return None
    if not isinstance(declared, Mapping):
        raise QuantizationError(f"{where}: quantization_config: found {declared!r}, expected an object")
    return _from_declared(declared, where)


def _from_declared(declared: Mapping[str, Any], where: str) -> QuantizationConfig:
    if "quantization" in declared:
        return _from_modelopt(declared["quantization"], where)
    method = declared.get("quant_method")
    if method == "modelopt" or "quant_algo" in declared:
        return _from_modelopt(declared, where)
    if method == "compressed-tensors" or (method is None and "config_groups" in declared):
        return CompressedTensorsConfig.from_dict(declared, where)
    if method == "fp8":
        return Fp8Config.from_dict(declared, where)
    raise QuantizationError(
        f"{where}: quantization method {method!r} is not supported; expected one of {', '.join(METHODS)}, or none"
    )


def _from_modelopt(declared: Mapping[str, Any], where: str) -> QuantizationConfig:
    """NVIDIA ModelOpt's, as ``hf_quant_config.json`` nests it or as config.json has it, flat and under newer names."""
    if not isinstance(declared, Mapping):
        raise QuantizationError(f"{where}: quantization: found {declared!r}, expected an object")
    algorithm = declared.get("quant_algo")
    if str(algorithm) not in MODELOPT:
        raise QuantizationError(f"{where}: quant_algo {algorithm!r} is not supported; expected {' or '.join(MODELOPT)}")
    for field in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if declared.get(field):
            raise QuantizationError(f"{where}: {field} is not supported; remove it to serve the KV unquantized")
    kind, activation = MODELOPT[str(algorithm)]
    place = f"{where}: {'exclude_modules' if declared.get('exclude_modules') else 'ignore'}"
    entries = entry_list(declared.get("exclude_modules") or declared.get("ignore"), place)
    excluded = [f"re:{fnmatch.translate(entry)}" if "*" in entry else entry for entry in entries]
    scheme = LinearScheme(
        kind, "weight_scale", activation=activation, source=f"detected in {where}{INPUT_NOTES.get(activation, '')}"
    )
    return Fp8Config(scheme, dict.fromkeys(excluded), place)
