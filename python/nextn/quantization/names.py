"""Matching of checkpoint module names against the entries of a quantization config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from nextn.errors import QuantizationError
from nextn.quantization.scheme import LinearScheme


def match_entry(name: str, entries: Collection[str]) -> str | None:
    """The entry that names the module: equal to it, or else the first "re:" whose pattern matches from its beginning.

    name: a checkpoint module name such as "model.layers.92.eh_proj", never a runtime name
    Raises QuantizationError if a pattern is not a regular expression.
    """
    if name in entries:
        return name
    return next((entry for entry in entries if entry.startswith("re:") and _pattern(entry).match(name)), None)


def _pattern(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry[3:])  # the module keeps compiled patterns
    except re.error as error:
        raise QuantizationError(f"quantization config: {entry!r} is no regular expression: {error}") from None


def match_prefix(name: str, entries: Collection[str]) -> str | None:
    """The entry that is the module, one of its parents, or its last part ("model.layers.3.mlp", "lm_head")."""
    return next((part for part in (*with_parents([name]), name.rpartition(".")[2]) if part in entries), None)


def unmatched_entries(entries: Iterable[str], modules: Collection[str]) -> list[str]:
    """Entries that name no module and no parent of one, exactly or by pattern. modules: checkpoint module names."""
    known = with_parents(modules)
    return [
        entry
        for entry in entries
        if not (any(map(_pattern(entry).match, known)) if entry.startswith("re:") else entry in known)
    ]


def entry_list(value: Any, where: str) -> tuple[str, ...]:
    """A list of entries out of a config; nothing is an empty one.

    Raises QuantizationError if it is something else.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise QuantizationError(f"{where}: found {value!r}, expected a list of module names")
    return tuple(value)


def with_parents(modules: Iterable[str]) -> dict[str, None]:
    """The modules and everything they are inside of, in a stable order."""
    known: dict[str, None] = {}
    for name in modules:
        while name and name not in known:
            known[name] = None
            name = name.rpartition(".")[0]
    return known


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
