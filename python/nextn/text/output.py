"""The text of one output as its tokens arrive, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextn.text.detokenizer import Detokenizer
from nextn.text.tags import find_first, num_held_back
from nextn.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextDelta:
    """What a push added.

    text: safe to show: no part of it can turn out to begin a stop string
    stopped: a stop string ended the output; ``stop`` is the one
    num_tokens: how many of the pushed tokens belong to the output, the one that completed the stop string included
    """

    text: str
    stopped: bool = False
    stop: str | None = None
    num_tokens: int = 0


class OutputAssembler:
    """Turns tokens into text, and finds stop strings wherever they fall.

    The result does not depend on how tokens are split into pushes. The caller leaves a stop *token* out.

    keep_stop: leave the stop string at the end of the text
    min_new_tokens: stop strings that begin in text of earlier tokens do not count
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_new_tokens: int = 0,
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._stop = tuple(stop)
        self._min_new_tokens = min_new_tokens
        self._keep_stop = keep_stop
        self._num_pushed = 0
        self._tail = ""  # not shown yet: it may begin a stop string
        self._stopped = False

    def push(self, token_ids: Sequence[int], finished: bool) -> TextDelta:
        """Add tokens; ``finished`` says that no more will come."""
        if self._stopped:
            return TextDelta("", stopped=True)
        if not self._stop:
            text = self._detokenizer.push_all(token_ids) + (self._detokenizer.flush() if finished else "")
            return TextDelta(text, num_tokens=len(token_ids))
        shown: list[str] = []
        for used, token_id in enumerate(token_ids, start=1):
            self._num_pushed += 1
            found = self._take(self._detokenizer.push(token_id), shown)
            if found is not None:
                return TextDelta("".join(shown), stopped=True, stop=found, num_tokens=used)
        if finished:
            found = self._take(self._detokenizer.flush(), shown)
            if found is not None:
                return TextDelta("".join(shown), stopped=True, stop=found, num_tokens=len(token_ids))
            shown.append(self._tail)
            self._tail = ""
        return TextDelta("".join(shown), num_tokens=len(token_ids))

    def _take(self, piece: str, shown: list[str]) -> str | None:
        """Add one token's text; move what is safe to ``shown``. Returns the stop string that is complete now."""
        if self._num_pushed < self._min_new_tokens:
            shown.append(piece)
            return None
        self._tail += piece
        first = find_first(self._tail, self._stop)
        if first is not None:
            at, stop = first
            shown.append(self._tail[: at + len(stop) if self._keep_stop else at])
            self._tail = ""
            self._stopped = True
            return stop
        end = len(self._tail) - num_held_back(self._tail, self._stop)
        shown.append(self._tail[:end])
        self._tail = self._tail[end:]
        return None
