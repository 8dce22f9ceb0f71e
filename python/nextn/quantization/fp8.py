"""``quant_method: fp8``: DeepSeek-V3's block format, and its older per-tensor form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nextn.errors import QuantizationError
from nextn.quantization.names import agreed, entry_list, match_entry, match_prefix, unmatched_entries
from nextn.quantization.scheme import INPUT_NOTES, ActivationKind, LinearScheme


@dataclass(frozen=True)
class Fp8Config:
    """scheme: of every linear that is not excluded; excluded: entries of ``modules_to_not_convert`` (the values are
    unused); where: the list's place in the files."""

    scheme: LinearScheme
    excluded: Mapping[str, None]
    where: str
    method: str = "fp8"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> Fp8Config:
        """Read a ``quantization_config``.

        Raises QuantizationError if it asks for something that is not supported.
        """
        code = raw.get("fmt", "e4m3")
        if code not in ("e4m3", "float8_e4m3fn"):
            raise QuantizationError(f"{where}: fmt: found {code!r}, expected 'e4m3'")
        activation = raw.get("activation_scheme", "dynamic")
        if activation not in ("dynamic", "static"):
            raise QuantizationError(f"{where}: activation_scheme: found {activation!r}, expected 'dynamic' or 'static'")
        block = raw.get("weight_block_size")
        source = f"detected in {where}"
        if block is None:
            kind: ActivationKind = "static_tensor" if activation == "static" else "dynamic_token"
            source += INPUT_NOTES.get(kind, "")
            scheme = LinearScheme("fp8_tensor", "weight_scale", activation=kind, source=source)
        else:
            if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
                raise QuantizationError(f"{where}: weight_block_size: found {block!r}, expected such as [128, 128]")
            if activation != "dynamic":
                raise QuantizationError(f"{where}: activation_scheme: found 'static', expected 'dynamic' with blocks")
            scheme = LinearScheme(
                "fp8_block", "weight_scale_inv", (block[0], block[1]), activation="dynamic_group", source=source
            )
        field = "modules_to_not_convert" if raw.get("modules_to_not_convert") else "ignored_layers"
        place = f"{where}: {field}"
        return cls(scheme, dict.fromkeys(entry_list(raw.get(field), place)), place)

    def scheme_for(self, shard_names: Sequence[str]) -> LinearScheme:
        return agreed(shard_names, [self._scheme_of(name) for name in shard_names])

    def unmatched_ignores(self, modules: Collection[str]) -> list[str]:
        names = [*modules, *dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules)]
        return [f"{self.where} entry {entry!r}" for entry in unmatched_entries(self.excluded, names)]

    def _scheme_of(self, name: str) -> LinearScheme:
        entry = match_entry(name, self.excluded) or match_prefix(name, self.excluded)
        if entry is not None:
            return LinearScheme("unquantized", source=f"modules_to_not_convert entry {entry!r}")
        return self.scheme
