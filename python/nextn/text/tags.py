"""Finding tags, and other fixed strings, in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def find_first(text: str, tags: Sequence[str]) -> tuple[int, str] | None:
    """Position of the tag that begins earliest, and that tag; of two at one place, the one listed first."""
    first: tuple[int, str] | None = None
    for tag in tags:
        at = text.find(tag)
        if at >= 0 and (first is None or at < first[0]):
            first = (at, tag)
    return first


def num_held_back(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that more text could complete to one of ``tags``."""
    longest = 0
    for tag in tags:
        for length in range(min(len(tag) - 1, len(text)), longest, -1):
            if tag.startswith(text[-length:]):
                longest = length
                break
    return longest
