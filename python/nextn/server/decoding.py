"""From raw bytes to a typed request: the one place where a bad body becomes a 400 or 413 with its ``param``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from msgspec import inspect
from starlette.requests import Request

from nextn.server.errors import ApiError, invalid, too_large

T = TypeVar("T")

MAX_DEPTH = 64
"""Levels of nesting in free-form JSON: deeper than any tool's schema, far from recursion limits."""

MAX_VALUES = 100_000
"""Values in it: to walk them takes a fraction of a second."""

_PATH = re.compile(r"^(?P<reason>.*?)(?: - at `(?:key` in `)?\$?(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL)
_NO_OPTION = re.compile(r"^Invalid (?:enum )?value (?P<found>.*)$", re.DOTALL)
_STEP = re.compile(r"\w+(?![\w\]])|\[")
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$", re.DOTALL)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, or 413 as soon as more than ``max_bytes`` were announced or received."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large(f"The body has {announced} bytes; at most {max_bytes} are accepted.")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large(f"The body has more than {max_bytes} bytes, the most that is accepted.")
        chunks.append(chunk)
    return b"".join(chunks)


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode strictly: unknown fields, wrong types, numbers out of range, NaN and bad UTF-8 are all refused."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _from_validation(str(error), decoder.type) from None
    except UnicodeDecodeError:
        raise invalid("The body is not valid UTF-8.") from None
    except msgspec.DecodeError as error:
        raise invalid(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None


def convert(value: dict[str, Any], to: type[T], where: str) -> T:
    """Part of a body that was decoded before its type was known, as strictly as ``decode``. where: its path"""
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise _from_validation(str(error), to, where) from None


def check_depth(value: Any, param: str) -> None:
    """Refuse free-form JSON that code further down (templates, encoders) could not walk, or not soon."""
    level, num_values = _containers([value]), 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        num_values += sum(map(len, level))
        if num_values > MAX_VALUES:
            raise invalid(f"'{param}' has {num_values} values or more; at most {MAX_VALUES} are accepted.", param)
        level = _containers(child for item in level for child in _children(item))
    if level:
        raise invalid(f"'{param}' is nested more than {MAX_DEPTH} levels deep.", param)


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _from_validation(text: str, body: Any, where: str = "") -> ApiError:
    match = _PATH.match(text)
    assert match is not None
    reason, inner = match["reason"], (match["path"] or "").lstrip(".")
    path = _join(where, inner) if inner else where
    if unknown := _UNKNOWN.match(reason):
        field = _join(path, unknown["field"])
        return invalid(f"Unknown parameter '{field:.200}'.", field[:200], "unknown_parameter")
    if missing := _MISSING.match(reason):
        field = _join(path, missing["field"])
        return invalid(f"Missing required parameter '{field}'.", field, "missing_required_parameter")
    if wrong := _NO_OPTION.match(reason):
        message = f"Invalid '{path:.200}': found {wrong['found']:.100}, expected {_options(body, inner)}."
        return invalid(message, path[:200], "invalid_value")
    if not path:
        return invalid(f"The body is wrong: {_lower_first(reason)}.")
    return invalid(f"Invalid '{path:.200}': {_lower_first(reason)}.", path[:200], "invalid_value")


def _options(body: Any, path: str) -> str:
    """What may stand at a path of a type where there are literals."""
    types = _alternatives([inspect.type_info(body)])
    for step in _STEP.findall(path):
        inner: list[inspect.Type] = []
        for known in types:
            if isinstance(known, inspect.StructType):
                inner += [field.type for field in known.fields if field.encode_name == step]
                inner += [inspect.LiteralType((known.tag,))] if known.tag_field == step else []
            elif isinstance(known, inspect.ListType):
                inner.append(known.item_type)
        types = _alternatives(inner)
    names = [repr(value) for known in types if isinstance(known, inspect.LiteralType) for value in known.values]
    names += ["an object"] if any(isinstance(known, inspect.StructType) for known in types) else []
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _alternatives(types: list[inspect.Type]) -> list[inspect.Type]:
    return [one for known in types for one in (known.types if isinstance(known, inspect.UnionType) else (known,))]


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
