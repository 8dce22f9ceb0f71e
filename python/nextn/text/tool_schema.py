"""What a tool's JSON schema says about the type of an argument, and how an argument's raw text becomes JSON.

GLM writes argument values as bare text: only the schema tells whether ``123`` is a number or a string.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote

MAX_LITERAL_LEN = 65536
"""Characters of a value that is tried as a Python literal; longer ones are JSON or text."""

MAX_SUBSCHEMAS = 200
"""Schemas looked at for one argument: references can multiply without end. Beyond, the type is not known."""

JSON_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})

NOTES = frozenset({"title", "description", "default", "examples", "$comment", "$schema", "$id", "deprecated"})
"""Keywords that ask for nothing."""

_ROOT = "#/$defs/root"
"""Where a tool's whole schema stands in that of one argument."""

Schema = Any
"""A JSON schema: a mapping or a boolean; anything else says nothing."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """The JSON types that a value may have; None when the schema does not say."""

    types: frozenset[str] | None

    @property
    def is_text(self) -> bool:
        """True if the raw text is the value: it can be passed on while it arrives."""
        return self.types == frozenset({"string"})

    def to_json(self, text: str) -> str:
        """The value as JSON text.

        A string, where the schema says so, is the text as it is. Else: what is JSON stays as it is written, a Python
        literal (True, None, ['a']) is converted, and the rest is a string. Where both a string and other types are
        allowed, only a reading of those other types is taken.
        """
        readings = [] if self.is_text else [r for r in (_as_json(text.strip()), _as_literal(text.strip())) if r]
        for json_text, json_type in readings:
            if self.types is None or (json_type in self.types and json_type != "string"):
                return json_text
        if readings and self.types is not None and "string" not in self.types:
            return readings[0][0]
        return json.dumps(text, ensure_ascii=False)


ANY = ValueType(None)


class ToolSchemas:
    """The argument types of the tools of a request, in OpenAI's form."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
        self._parameters = {f.get("name"): f.get("parameters") for f in functions}

    def type_of(self, tool: str, argument: str) -> ValueType:
        """The type of an argument; ANY if the tool or the argument is not known."""
        root = self._parameters.get(tool)
        reader = _Reader(root)
        return ValueType(reader.types_of(reader.property_of(root, argument)))

    def arguments_of(self, tool: str) -> list[tuple[str, Schema, bool]]:
        """Name, schema and whether it is required, of each argument that the tool's schema lists, in its order.

        The schema stands alone: those with references share a copy of the root, into which they point.
        """
        root = self._parameters.get(tool)
        if not isinstance(root, Mapping):
            return []
        given, listed = root.get("properties"), root.get("required")
        properties = given if isinstance(given, Mapping) else {}
        required = dict.fromkeys(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else {}
        names = [*properties, *(name for name in required if name not in properties)]
        definitions = {"root": _moved(root)}
        found = []
        for name in names:
            schema = properties.get(name, True)
            if isinstance(schema, Mapping) and '"$ref"' in json.dumps(schema):
                place = name.replace("~", "~0").replace("/", "~1")
                schema = {"$ref": f"{_ROOT}/properties/{place}", "$defs": definitions}
            found.append((name, schema, name in required))
        return found

    def texts_of(self, tool: str, argument: str) -> list[str] | None:
        """The texts of the values that an argument is limited to, as ``to_json`` reads them back; None if it is not."""
        root = self._parameters.get(tool)
        reader, value_type = _Reader(root), self.type_of(tool, argument)
        values = reader.values_of(reader.property_of(root, argument))
        if values is None or value_type.types is None:
            return None
        texts = []
        for value in values:
            if _type_name(value) in value_type.types:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                if value_type.to_json(text) != json.dumps(value, ensure_ascii=False):
                    return None
                texts.append(text)
        return list(dict.fromkeys(texts))

    def allows_any_text(self, tool: str, argument: str) -> bool:
        """Whether text of any kind is valid: alone, or beside other types that ask for nothing further."""
        root = self._parameters.get(tool)
        reader = _Reader(root)
        schema = reader.property_of(root, argument)
        return schema is None or reader.allows_any_text(schema)


class _Reader:
    """Follows references and combinations from one schema to what it says about one value.

    root: what references point into
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_left = MAX_SUBSCHEMAS

    def property_of(self, schema: Schema, name: str, seen: tuple[str, ...] = ()) -> Schema:
        """The schema of a property, wherever the object's schema describes it; None if it does not."""
        self._num_left -= 1
        if not isinstance(schema, Mapping) or self._num_left < 0:
            return None
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            return properties[name]
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref not in seen:
            found = self.property_of(_resolve(ref, self._root), name, (*seen, ref))
            if found is not None:
                return found
        for part in (*_parts(schema, "allOf"), *_parts(schema, "anyOf"), *_parts(schema, "oneOf")):
            found = self.property_of(part, name, seen)
            if found is not None:
                return found
        return schema.get("additionalProperties")

    def types_of(self, schema: Schema, seen: tuple[str, ...] = ()) -> frozenset[str] | None:
        """The types that a schema allows: every keyword narrows them. None if no keyword says anything."""
        self._num_left -= 1
        if not isinstance(schema, Mapping) or self._num_left < 0:
            return None
        limits = [_declared(schema)]
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref not in seen:
            limits.append(self.types_of(_resolve(ref, self._root), (*seen, ref)))
        limits += [self.types_of(part, seen) for part in _parts(schema, "allOf")]
        for keyword in ("anyOf", "oneOf"):
            branches = [self.types_of(part, seen) for part in _parts(schema, keyword)]
            known = [branch for branch in branches if branch is not None]
            if known and len(known) == len(branches):
                limits.append(frozenset().union(*known))
        narrowing = [limit for limit in limits if limit is not None]
        if not narrowing:
            return None
        types = JSON_TYPES.intersection(*narrowing) or narrowing[0]
        return types | {"null"} if schema.get("nullable") is True else types

    def values_of(self, schema: Schema, seen: tuple[str, ...] = ()) -> list[Any] | None:
        """What ``enum``, ``const`` and types of one or two values limit a value to; None if they do not."""
        self._num_left -= 1
        if not isinstance(schema, Mapping) or self._num_left < 0:
            return None
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            return [*values, None] if schema.get("nullable") is True else values
        ref = schema.get("$ref")
        if isinstance(ref, str):
            return None if ref in seen else self.values_of(_resolve(ref, self._root), (*seen, ref))
        match sorted(set(schema) - NOTES):
            case ["type"]:
                of_types: dict[str, list[Any]] = {"null": [None], "boolean": [True, False]}
                return of_types.get(str(schema["type"]))
            case ["anyOf" | "oneOf" as keyword]:
                found = [self.values_of(branch, seen) for branch in _parts(schema, keyword)]
                return None if None in found else [value for one in found for value in one or ()]
        return None

    def allows_any_text(self, schema: Schema) -> bool:
        """As that of ``ToolSchemas``."""
        schema = self._meant(schema)
        if isinstance(schema, Mapping) and set(schema) - NOTES == {"anyOf"}:
            branches = _parts(schema, "anyOf")
            return any(map(self.allows_any_text, branches)) and all(map(self._is_plain, branches))
        return self._is_plain(schema)

    def _is_plain(self, schema: Schema) -> bool:
        """Whether a schema says a type at most."""
        schema = self._meant(schema)
        if not isinstance(schema, Mapping):
            return schema is True
        types = schema.get("type", [])
        names = [types] if isinstance(types, str) else types if isinstance(types, list) else [None]
        return set(schema) - NOTES <= {"type"} and all(name in JSON_TYPES for name in names)

    def _meant(self, schema: Schema) -> Schema:
        """The schema that one which only points to another stands for."""
        while isinstance(schema, Mapping) and self._num_left > 0:
            self._num_left -= 1
            asked = set(schema) - NOTES
            if asked == {"$ref"} and isinstance(schema["$ref"], str):
                schema = _resolve(schema["$ref"], self._root)
            elif asked == {"allOf"} and len(parts := _parts(schema, "allOf")) == 1:
                schema = parts[0]
            else:
                return schema
        return schema if schema is True else None


def refers_into_root(schema: Schema) -> bool:
    """Whether the schema of an argument, as ``arguments_of`` gives it, has the tool's whole schema in it."""
    return isinstance(schema, Mapping) and str(schema.get("$ref")).startswith(_ROOT)


def _moved(schema: Schema) -> Schema:
    """A root that stands at _ROOT, its references still pointing into it."""
    if isinstance(schema, Mapping):
        return {
            key: f"{_ROOT}{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value)
            for key, value in schema.items()
        }
    return [_moved(item) for item in schema] if isinstance(schema, list) else schema


def _declared(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """The types that one schema object names by ``type``, or by the values of ``enum`` or ``const``."""
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
    types = {name for name in names if isinstance(name, str) and name in JSON_TYPES}
    if "number" in types:
        types.add("integer")
    values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
    values = [schema["const"]] if "const" in schema else values
    if values:
        of_values = {_type_name(value) for value in values}
        types = types & of_values or of_values
    if not types and "properties" in schema:
        return frozenset({"object"})
    if not types and "items" in schema:
        return frozenset({"array"})
    return frozenset(types) or None


def _parts(schema: Mapping[str, Any], keyword: str) -> list[Schema]:
    parts = schema.get(keyword)
    return list(parts) if isinstance(parts, list) else []


def _resolve(ref: str, root: Schema) -> Schema:
    """The schema that a JSON pointer into ``root`` names, as in ``#/$defs/Unit``; None if there is none.

    A reference is a URI: %20 in it stands for a space. References to another document or to an anchor are not followed.
    """
    start, *steps = unquote(ref).split("/")
    if start != "#":
        return None
    found: Any = root
    for step in steps:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isascii() and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def _as_json(text: str) -> tuple[str, str] | None:
    """(text, its JSON type) if it is JSON. The text stays as written: no digit of a number is lost."""
    try:
        return text, _type_name(json.loads(text, parse_constant=_refuse_constant))
    except (ValueError, RecursionError):
        return None


def _as_literal(text: str) -> tuple[str, str] | None:
    """(JSON text, its type) of a Python constant, list, dict or quoted string."""
    if len(text) > MAX_LITERAL_LEN or not (text in ("True", "False", "None") or text.startswith(("[", "{", "'", '"'))):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            value = ast.literal_eval(text)
        return json.dumps(value, allow_nan=False), _type_name(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
    return names.get(type(value), "array")
