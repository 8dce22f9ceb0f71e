"""Who owns which KV page: free, a running sequence, or the prefix cache."""

from __future__ import annotations

from itertools import takewhile

from nextn.scheduler.prefix_cache import PrefixCache
from nextn.scheduler.sequence import Sequence


class KVPages:
    """All pages of the KV pool. Every page is free, private to one sequence, or in the prefix cache.

    num_pages: pages in the pool
    page_size: tokens per page
    """

    def __init__(self, num_pages: int, page_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._enable_prefix_cache = enable_prefix_cache
        self._free = list(range(num_pages - 1, -1, -1))
        self.cache = PrefixCache(page_size)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that could be handed out now, evicting what nobody uses."""
        return len(self._free) + self.cache.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def attach_prefix(self, seq: Sequence, max_tokens: int) -> None:
        """Give a sequence that has no pages the longest cached prefix, and a reference on it."""
        assert not seq.pages, "a prefix is attached before anything is computed"
        if not self._enable_prefix_cache:
            return
        nodes = self.cache.match(seq.tokens, seq.request.cache_salt, max_tokens)
        self.cache.acquire(nodes)
        seq.nodes = nodes
        seq.pages = [node.page for node in nodes]
        seq.num_computed = len(nodes) * self.page_size
        seq.num_draft_computed = sum(1 for _ in takewhile(lambda node: node.has_draft, nodes)) * self.page_size

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens in all; False (and nothing changed) when there is none."""
        missing = self.pages_for(num_tokens) - len(seq.pages)
        if missing <= 0:
            return True
        if missing > len(self._free):
            if missing > self.num_available:
                return False
            self._free.extend(self.cache.evict(missing - len(self._free)))
        seq.pages.extend(self._free.pop() for _ in range(missing))
        return True

    def publish(self, seq: Sequence) -> None:
        """Put the pages that the target has computed into the prefix cache, where others find them.

        Where an equal page is there already, the sequence takes that one and its own becomes free.
        """
        if not self._enable_prefix_cache:
            return
        size = self.page_size
        while (len(seq.nodes) + 1) * size <= seq.num_computed:
            index = len(seq.nodes)
            key = tuple(seq.tokens[index * size : (index + 1) * size])
            page = seq.pages[index]
            node = self.cache.insert(seq.nodes[-1] if seq.nodes else None, seq.request.cache_salt, key, page)
            if node.page != page:
                self._free.append(page)
                seq.pages[index] = node.page
                if not node.has_draft:
                    seq.num_draft_computed = min(seq.num_draft_computed, index * size)
            self.cache.acquire([node])
            seq.nodes.append(node)
        num_with_draft = seq.num_draft_computed // size
        for node in reversed(seq.nodes[:num_with_draft]):
            if node.has_draft:
                break
            node.has_draft = True

    def release(self, seq: Sequence) -> None:
        """Take all pages back: private ones become free, cached ones lose the sequence's reference."""
        self._free.extend(seq.pages[len(seq.nodes) :])
        self.cache.release(seq.nodes)
        seq.pages = []
        seq.nodes = []
        seq.num_computed = seq.num_draft_computed = 0

    def flush(self) -> int:
        """Empty the prefix cache of everything unreferenced; returns the number of pages freed."""
        pages = self.cache.evict(self.cache.num_pages)
        self._free.extend(pages)
        return len(pages)

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that every page has exactly one owner and every reference count is right."""
        cached = self.cache.pages_with_references()
        expected: dict[int, int] = dict.fromkeys(cached, 0)
        private: list[int] = []
        for seq in sequences:
            for node in seq.nodes:
                expected[node.page] += 1
            private.extend(seq.pages[len(seq.nodes) :])
        assert expected == cached, "reference counts disagree with the sequences"
        assert sorted([*self._free, *cached, *private]) == list(range(self.num_pages)), "a page is lost or owned twice"
        assert self.cache.num_pages == len(cached)
        assert self.cache.num_evictable == sum(count == 0 for count in cached.values())
