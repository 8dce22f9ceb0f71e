"""compressed-tensors FP8, the format of the official GLM-4.5/4.6-FP8 checkpoints (vllm-project/compressed-tensors)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nextn.errors import QuantizationError
from nextn.quantization.names import agreed, entry_list, match_entry, unmatched_entries
from nextn.quantization.scheme import INPUT_NOTES, ActivationKind, LinearScheme, SchemeKind

SUPPORTED = (
    "compressed-tensors is served with 8-bit symmetric float weights, strategy channel, tensor or block, and "
    "activations that are absent, dynamic per token or group, or static per tensor"
)
FORMATS = ("float-quantized", "naive-quantized")
MIXED = "mixed-precision"
"""The format of a config whose groups each have their own."""
_KINDS: dict[str, SchemeKind] = {"channel": "fp8_channel", "tensor": "fp8_tensor", "block": "fp8_block"}


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """targets: of all groups, in the config's order, each with its scheme; where: the config's file.

    ignore: entries of modules that are not quantized (values are unused: a dict keeps order and finds a name at once)
    """

    targets: Mapping[str, LinearScheme]
    ignore: Mapping[str, None]
    where: str
    method: str = "compressed-tensors"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> CompressedTensorsConfig:
        """Read a ``quantization_config``.

        Raises QuantizationError if it asks for something that is not supported.
        """
        form = raw.get("format", "float-quantized")
        if form != MIXED:
            _check_format(form, f"{where}: format")
        if raw.get("transform_config"):
            raise QuantizationError(
                f"{where}: transform_config is not supported: its weights are rotated, and mean something else without "
                "the rotation of what they multiply; quantize the checkpoint without transforms"
            )
        if raw.get("kv_cache_scheme"):
            raise QuantizationError(f"{where}: kv_cache_scheme is not supported; remove it to serve the KV unquantized")
        groups = raw.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise QuantizationError(f"{where}: config_groups: found {groups!r}, expected at least one group")
        targets: dict[str, LinearScheme] = {}
        for name, group in groups.items():
            of_group = _targets(name, group, where)
            _check_format(group.get("format") or form, f"{where}: {name}.format")
            scheme = _scheme(name, group, where)
            for target in of_group:
                targets.setdefault(target, scheme)
        return cls(
            targets=targets,
            ignore=dict.fromkeys(entry_list(raw.get("ignore"), f"{where}: ignore")),
            where=where,
        )

    def scheme_for(self, shard_names: Sequence[str]) -> LinearScheme:
        return agreed(shard_names, [self._scheme_of(name) for name in shard_names])

    def unmatched_ignores(self, modules: Collection[str]) -> list[str]:
        return [f"{self.where}: ignore entry {entry!r}" for entry in unmatched_entries(self.ignore, modules)]

    def _scheme_of(self, name: str) -> LinearScheme:
        entry = match_entry(name, self.ignore)
        if entry is not None:
            return LinearScheme("unquantized", source=f"ignore entry {entry!r}")
        target = match_entry(name, self.targets) or "Linear"  # a name or a pattern counts for more than the class
        return self.targets.get(target, LinearScheme("unquantized", source="no config group targets it"))


def _check_format(form: Any, place: str) -> None:
    if form not in FORMATS:
        raise QuantizationError(f"{place}: found {form!r}, expected {FORMATS[0]!r}; {SUPPORTED}")


def _targets(name: str, group: Mapping[str, Any], where: str) -> tuple[str, ...]:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    found = entry_list(targets, f"{where}: {name}.targets")
    if not found:
        raise QuantizationError(f"{where}: {name}.targets: found {targets!r}, expected a list such as ['Linear']")
    return found


def _scheme(name: str, group: Mapping[str, Any], where: str) -> LinearScheme:
    weights = group.get("weights") or {}
    place = f"{where}: {name}.weights"
    if not isinstance(weights, Mapping):
        raise QuantizationError(f"{place}: found {weights!r}, expected an object; {SUPPORTED}")
    found = {key: weights.get(key) for key in ("num_bits", "type", "strategy")}
    if (
        weights.get("num_bits") != 8
        or weights.get("type") != "float"
        or str(weights.get("strategy")) not in _KINDS
        or not weights.get("symmetric", True)
        or weights.get("dynamic")
    ):
        raise QuantizationError(f"{place}: found {found}; {SUPPORTED}")
    block = None
    if weights["strategy"] == "block":
        structure = weights.get("block_structure")
        if (
            not isinstance(structure, list)
            or len(structure) != 2
            or not all(type(n) is int and n > 0 for n in structure)
        ):
            raise QuantizationError(f"{place}.block_structure: found {structure!r}, expected such as [128, 128]")
        block = (structure[0], structure[1])
    activation = _activation(name, group.get("input_activations"), where)
    return LinearScheme(
        _KINDS[weights["strategy"]],
        scale_suffix="weight_scale",
        block=block,
        activation=activation,
        source=f"detected in {where}, {name}{INPUT_NOTES.get(activation, '')}",
    )


def _activation(name: str, raw: Mapping[str, Any] | None, where: str) -> ActivationKind:
    if not raw:
        return "none"
    if not isinstance(raw, Mapping):
        raise QuantizationError(f"{where}: {name}.input_activations: found {raw!r}, expected an object; {SUPPORTED}")
    known: dict[tuple[Any, bool], ActivationKind] = {
        ("token", True): "dynamic_token",
        ("group", True): "dynamic_group",
        ("tensor", True): "dynamic_token",  # finer than asked, from the same values
        ("tensor", False): "static_tensor",
    }
    kind = known.get((str(raw.get("strategy")), bool(raw.get("dynamic"))))
    if kind is None or raw.get("num_bits") != 8 or raw.get("type") != "float":
        found = {key: raw.get(key) for key in ("num_bits", "type", "strategy", "dynamic")}
        raise QuantizationError(f"{where}: {name}.input_activations: found {found}; {SUPPORTED}")
    return kind
