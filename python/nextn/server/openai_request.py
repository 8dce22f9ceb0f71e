"""What chat and text completions check alike: fields that are served in part, and fields with several names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from nextn.server.errors import invalid, unsupported
from nextn.server.neutral import check_neutral
from nextn.server.requests import OpenAIRequest

T = TypeVar("T")


def check_common(asked: OpenAIRequest) -> None:
    """Refuse what no OpenAI endpoint of this server does."""
    check_neutral(asked)
    if asked.store:
        raise unsupported("'store' is not supported: this server keeps no answers; leave it out.", "store")
    if asked.service_tier not in (None, "auto", "default"):
        message = f"'service_tier' {asked.service_tier!r:.100} is not supported; use 'auto' or 'default'."
        raise unsupported(message, "service_tier")
    options = asked.stream_options
    if options is not None and not asked.stream:
        raise invalid("'stream_options' is allowed only with 'stream': true.", "stream_options", "invalid_value")
    if options is not None and options.include_obfuscation:
        param = "stream_options.include_obfuscation"
        raise unsupported(f"'{param}' is not supported: chunks are not padded; leave it out.", param)


def agreed(given: Mapping[str, T | None]) -> tuple[str, T] | None:
    """A field that has several names: the first name that has a value, and the value. None where none has.

    given: value per name; None stands for absent
    Raises ApiError 400, naming both, where two values differ.
    """
    found = [(name, value) for name, value in given.items() if value is not None]
    for name, value in found[1:]:
        if value != found[0][1]:
            message = f"'{found[0][0]}' and '{name}' contradict each other; send one of them."
            raise invalid(message, found[0][0], "invalid_value")
    return found[0] if found else None
