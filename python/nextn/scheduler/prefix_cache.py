"""A tree of computed KV pages, keyed by the tokens they hold, for requests that share a prefix.

A node is one full page. Its key is the page's tokens under its parent's path, so equal paths mean equal prefixes by
comparison of tokens, never by hash alone. A sequence holds a reference on every node of its path; nodes without
references stay until memory is needed, and go least recently used first, leaves before their parents.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MIN_CANDIDATES = 64
"""Candidates for eviction up to which those that are none any more are not looked for."""

Key = tuple[int | str, ...]


class CacheNode:
    """One cached page.

    key: the page's tokens; on the first page of a prefix, the salt before them
    has_draft: the draft layer's entries are there too
    last_used: a logical clock value
    """

    __slots__ = ("alive", "children", "has_draft", "key", "last_used", "page", "parent", "ref_count")

    def __init__(self, parent: CacheNode | None, key: Key, page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[Key, CacheNode] = {}
        self.ref_count = 0
        self.last_used = 0
        self.alive = True
        self.has_draft = False


class _Candidate(NamedTuple):
    last_used: int
    order: int
    node: CacheNode

    @property
    def is_valid(self) -> bool:
        """False once the node has been used, extended or evicted since it became a candidate."""
        node = self.node
        return node.alive and not node.ref_count and not node.children and node.last_used == self.last_used


class PrefixCache:
    """The tree, its reference counts and its eviction order."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._root = CacheNode(None, (), -1)
        self._clock = 0
        self._order = 0
        self._candidates: list[_Candidate] = []
        self.num_pages = 0
        self.num_evictable = 0

    def match(self, tokens: Sequence[int], salt: str, max_tokens: int) -> list[CacheNode]:
        """The longest cached path for ``tokens``, at most ``max_tokens`` long. Takes no reference."""
        node: CacheNode | None = self._root
        path: list[CacheNode] = []
        size = self._page_size
        while node is not None and (len(path) + 1) * size <= max_tokens:
            key: Key = tuple(tokens[len(path) * size : (len(path) + 1) * size])
            node = node.children.get(key if path else (salt, *key))
            if node is not None:
                path.append(node)
        return path

    def has_next(self, path: Sequence[CacheNode], tokens: Sequence[int], salt: str) -> bool:
        """Whether ``match`` may find more by now than a path that it gave: the page behind that, or a new path where
        that was evicted."""
        if path and not path[-1].alive:
            return True
        first = len(path) * self._page_size
        key: Key = tuple(tokens[first : first + self._page_size])
        return (key in path[-1].children) if path else ((salt, *key) in self._root.children)

    def insert(self, parent: CacheNode | None, salt: str, key: Key, page: int) -> CacheNode:
        """The node for ``key`` under ``parent`` (None: a first page); made with ``page`` unless it exists.

        The caller compares ``node.page`` with ``page`` to learn whether its page was taken.
        """
        if parent is None:
            parent, key = self._root, (salt, *key)
        node = parent.children.get(key)
        if node is None:
            node = CacheNode(parent, key, page)
            parent.children[key] = node
            self.num_pages += 1
            self.num_evictable += 1
            self._offer(node)
        return node

    def acquire(self, nodes: Iterable[CacheNode]) -> None:
        for node in nodes:
            if node.ref_count == 0:
                self.num_evictable -= 1
            node.ref_count += 1

    def release(self, nodes: Sequence[CacheNode]) -> None:
        """Give back references; the path becomes the most recently used one."""
        self._clock += 1
        for node in reversed(nodes):
            assert node.ref_count > 0, "a cache node was released twice"
            node.ref_count -= 1
            node.last_used = self._clock
            if node.ref_count == 0:
                self.num_evictable += 1
                self._offer(node)

    def evict(self, num_pages: int) -> list[int]:
        """Remove up to ``num_pages`` unreferenced nodes and return their pages."""
        pages: list[int] = []
        while len(pages) < num_pages and self._candidates:
            candidate = heapq.heappop(self._candidates)
            if not candidate.is_valid:
                continue
            node = candidate.node
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            node.alive = False
            self.num_pages -= 1
            self.num_evictable -= 1
            pages.append(node.page)
            self._offer(parent)
        return pages

    def _offer(self, node: CacheNode) -> None:
        """Make ``node`` a candidate for eviction if it is an unreferenced leaf (checked again when its turn comes)."""
        if node.parent is not None and node.ref_count == 0 and not node.children:
            self._order += 1
            heapq.heappush(self._candidates, _Candidate(node.last_used, self._order, node))
            if len(self._candidates) > 2 * self.num_pages + MIN_CANDIDATES:
                self._candidates = [candidate for candidate in self._candidates if candidate.is_valid]
                heapq.heapify(self._candidates)

    def nodes(self) -> Iterator[CacheNode]:
        """All cached pages, parents before children; for checks."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def pages_with_references(self) -> dict[int, int]:
        """Page → reference count, over the whole tree; for checks."""
        found: dict[int, int] = {}
        for node in self.nodes():
            assert node.page not in found, "a page stands twice in the prefix cache"
            found[node.page] = node.ref_count
        return found
