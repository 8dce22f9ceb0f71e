"""Which tokens a request's grammar allows, at each row of a verify step.

A matcher stands where the sequence's output ends. Rows behind drafts are reached by trying these, and going back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence as Rows
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

from nextn.errors import RequestError
from nextn.scheduler.sequence import Sequence
from nextn.speculative.logits import Row
from nextn.text.grammar_compiler import compile_grammar, read_vocabulary, short_error

logger = logging.getLogger(__name__)

NUM_KEPT = 64
"""Compiled grammars that are kept for the next request that has the same."""

ALL = -1
"""A word of 32 tokens that are all allowed."""


class Grammars:
    """Owns the matchers of the sequences that have a grammar. ``known`` and ``compile`` may be called from any thread.

    tokenizer: None where grammars are not served
    eos_token_ids: one of these follows a grammar's end
    """

    def __init__(self, tokenizer: LLTokenizer | None, vocab_size: int, eos_token_ids: Rows[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        # Threads: where text is free, a mask of a large vocabulary takes a millisecond.
        self._executor = None if tokenizer is None else LLExecutor()
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._compiled: dict[str, LLMatcher] = {}  # the latest used are the last
        self._matchers: WeakKeyDictionary[Sequence, _Matcher] = WeakKeyDictionary()
        self._failed: list[tuple[Sequence, str]] = []

    @classmethod
    def of_tokenizer(cls, folder: str | Path, vocab_size: int, eos_token_ids: Rows[int]) -> Grammars:
        """For the tokenizer.json of a folder; without one that can be read, none is served."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file() or not eos_token_ids:
            return cls(None, vocab_size)
        try:
            return cls(read_vocabulary(folder, vocab_size, eos_token_ids), vocab_size, eos_token_ids)
        except (OSError, ValueError) as error:
            logger.warning("%s: answers cannot be held to a schema or a grammar: %s", path, error)
            return cls(None, vocab_size)

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning. Raises RequestError where the grammar cannot be served."""
        known = self.known(grammar)
        if known is not None:
            return known
        compiled = self._compile(grammar)
        with self._lock:
            if len(self._compiled) >= NUM_KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = compiled
            return compiled.deep_copy()

    def known(self, grammar: str) -> LLMatcher | None:
        """``compile`` of what is kept; None where there is something to compile."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None)
            if compiled is None:
                return None
            self._compiled[grammar] = compiled
            return compiled.deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            raise RequestError("grammars are not served: this engine has no tokenizer, or no token ends an output")
        try:
            return compile_grammar(self._tokenizer, grammar)
        except RequestError as error:
            raise RequestError(f"grammar: {error}; correct it or leave it out") from None

    def start(self, seq: Sequence, matcher: LLMatcher) -> None:
        """A sequence whose output ``matcher`` follows from here on."""
        self._matchers[seq] = _Matcher(matcher)

    def allowed(self, rows: Rows[Row]) -> np.ndarray | None:
        """The tokens that may come next: [R, ⌈V / 32⌉] int32, bit t % 32 of word t // 32 for token t; None for all."""
        if not self._matchers or not any(row.seq in self._matchers for row in rows):
            return None
        words = allocate_token_bitmask(len(rows), self._vocab_size)
        held = [(i, row, self._matchers[row.seq]) for i, row in enumerate(rows) if row.seq in self._matchers]
        for _, row, matcher in held:
            matcher.follow(row.seq)
        at_output = [(matcher.matcher, i) for i, row, matcher in held if not row.drafts]
        if at_output:
            assert self._executor is not None, "there are matchers"
            fill_next_token_bitmask_par(self._executor, at_output, words)
        for i, row, matcher in held:
            if row.drafts:
                matcher.fill_behind(row.drafts, words, i)
            if matcher.error:
                words[i] = ALL
                self._failed.append((row.seq, matcher.error))
                self._matchers.pop(row.seq, None)
        return words

    def followed(self, seq: Sequence, tokens: list[int]) -> list[int]:
        """So many of the next tokens of a sequence as its grammar allows, at least the first, which was masked.

        All, where it has failed.
        """
        matcher = self._matchers.get(seq)
        return tokens if matcher is None else tokens[: max(matcher.num_allowed(tokens, self._eos_token_ids), 1)]

    def take_failed(self) -> dict[Sequence, str]:
        """The sequences whose grammar has failed since the last call, and why. What they said since is not held."""
        failed, self._failed = dict(self._failed), []
        return failed


class _Matcher:
    """A matcher, and how much of the output it has taken.

    error: why it cannot go on; nothing while it can
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._num_taken = 0
        self._has_left = False

    @property
    def error(self) -> str:
        return short_error(self.matcher) or ("the output has left it" if self._has_left else "")

    def follow(self, seq: Sequence) -> None:
        """Take what is new of the output."""
        new = seq.tokens[seq.num_prompt + self._num_taken :]
        num_new = self.matcher.try_consume_tokens(new) if new else 0
        self._num_taken += num_new
        self._has_left = num_new < len(new)

    def num_allowed(self, tokens: list[int], eos_token_ids: frozenset[int]) -> int:
        """How many of these may follow the output as far as it is taken, one after the other."""
        num_tried: int = self.matcher.try_consume_tokens(tokens)
        # A matcher that nothing can extend takes no end, although its mask allows it.
        has_ended = self.matcher.is_stopped() and not self.matcher.is_error()
        takes_end = has_ended and num_tried < len(tokens) and tokens[num_tried] in eos_token_ids
        if num_tried:
            self.matcher.rollback(num_tried)
        return num_tried + takes_end

    def fill_behind(self, drafts: list[int], words: np.ndarray, i: int) -> None:
        """Write what may follow drafts into words[i]; everything, where no output gets there."""
        num_tried = self.matcher.try_consume_tokens(drafts)
        if num_tried == len(drafts):
            fill_next_token_bitmask(self.matcher, words, i)
        if num_tried:
            self.matcher.rollback(num_tried)
