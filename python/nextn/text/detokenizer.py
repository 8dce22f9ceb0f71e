"""Token ids to text, piece by piece, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from nextn.text.tokenizer import Tokenizer

MAX_HELD_BACK = 16
"""Tokens held back before what cannot become a character is let go; a character takes four at most."""


class Detokenizer:
    """Incremental decoding of one output. Concatenated, the pieces are what decoding all tokens at once gives.

    One exception: in vocabularies with byte fallback, a byte that cannot belong to a character turns whole bytes next
    to it to U+FFFD when they are decoded at once; characters that were complete before it are kept here.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held_back: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is complete now; empty while a character is not."""
        if not self._tokenizer.is_shown(token_id, self._skip_special_tokens):
            return ""  # the stream would hold it back and decode it again at every step
        self._held_back.append(token_id)
        try:
            piece: str | None = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # the library's own type: earlier text would change, see above
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self.flush()
        if piece is None:
            return self._let_go() if len(self._held_back) % MAX_HELD_BACK == 0 else ""
        self._held_back = []
        return piece

    def _let_go(self) -> str:
        """The text of all held back tokens but the last few; the stream decodes all of them again at every step.

        A cut changes the text unless it falls between two characters (or two U+FFFD) and text follows it, which holds
        whatever tokens come later.
        """
        whole = self._tokenizer.decode(self._held_back, self._skip_special_tokens)
        for at in range(len(self._held_back) - 1, 0, -1):
            text = self._tokenizer.decode(self._held_back[:at], self._skip_special_tokens)
            rest = self._tokenizer.decode(self._held_back[at:], self._skip_special_tokens)
            if rest and text + rest == whole:
                self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
                again, self._held_back = self._held_back[at:], []
                return text + self.push_all(again)
        return ""

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join(self.push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """What was held back when the output ends in the middle of a character."""
        rest = self._tokenizer.decode(self._held_back, self._skip_special_tokens) if self._held_back else ""
        self._held_back = []
        return rest
