"""Cutting text and token lists at random, for tests of what must not depend on the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from hypothesis import strategies as st

S = TypeVar("S", bound=Sequence[Any])


def cut(whole: S, cuts: Sequence[int]) -> list[S]:
    """The pieces between the cuts, empty ones where cuts coincide."""
    places = [0, *sorted(at % (len(whole) + 1) for at in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(places)]  # type: ignore[misc]


def cuts() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 400), max_size=30)


def mixes(*words: str) -> st.SearchStrategy[str]:
    """Texts that are full of the given words, of their beginnings, and of other text."""
    beginnings = sorted({word[:n] for word in words for n in range(1, len(word))})
    parts = st.one_of(st.sampled_from(words), st.sampled_from(beginnings), st.sampled_from('a<>\n "\\/é日{}'))
    return st.lists(parts, max_size=24).map("".join)
