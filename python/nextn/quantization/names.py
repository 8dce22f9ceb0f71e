"""Matching of checkpoint module names against the entries of a quantization config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nextn.errors import QuantizationError
from nextn.quantization.scheme import LinearScheme


def match_entry(name: str, entries: Iterable[str]) -> str | None:
    """The first entry that names the module: equal to it, or "re:" and a pattern that matches from its beginning.

    name: a checkpoint module name such as "model.layers.92.eh_proj", never a runtime name
    Raises QuantizationError if a pattern is not a regular expression.
    """
    for entry in entries:
        if entry.startswith("re:"):
            try:
                if re.match(entry[3:], name):
                    return entry
            except re.error as error:
                raise QuantizationError(f"quantization config: {entry!r} is no regular expression: {error}") from None
        elif entry == name:
            return entry
    return None


def match_prefix(name: str, entries: Iterable[str]) -> str | None:
    """The first entry that is the module, one of its parents, or its last part ("lm_head", "model.layers.3.mlp")."""
    for entry in entries:
        if name == entry or name.startswith(f"{entry}.") or name.rsplit(".", 1)[-1] == entry:
            return entry
    return None


def agreed(names: Sequence[str], schemes: Sequence[LinearScheme]) -> LinearScheme:
    """The one scheme of a fused module's shards.

    Raises QuantizationError, naming two shards, if they differ.
    """
    for name, scheme in zip(names, schemes, strict=True):
        if (scheme.kind, scheme.block, scheme.activation) != (schemes[0].kind, schemes[0].block, schemes[0].activation):
            raise QuantizationError(
                f"{names[0]} is {schemes[0].kind} ({schemes[0].source}) but {name} is {scheme.kind} ({scheme.source}); "
                "they are served as one fused module, so quantize both alike"
            )
    return schemes[0]
