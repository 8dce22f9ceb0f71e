"""Log-probabilities in the three forms that clients expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nextn.protocol.messages import TokenLogprobs
from nextn.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI uses the same figure."""

TokenText = Callable[[int], str]


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(tokens: Iterable[TokenLogprobs], tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion; ``bytes`` is exact also for a part of a character."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(tokenizer.token_bytes(token_id))}

    content = []
    for token in tokens:
        top = [entry(token_id, logprob) for token_id, logprob in token.top[:num_top]]
        content.append({**entry(token.token_id, token.logprob or 0.0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Iterable[TokenLogprobs], text_of: TokenText, num_top: int, first_offset: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of a text completion; ``first_offset`` is where the first token's text begins.

    Offsets are of the tokens' own texts, joined: the text of the answer is theirs where tokens are whole characters and
    none is hidden. The chosen token is always among the top, as OpenAI has it.
    """
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offset = first_offset
    for token in tokens:
        text = text_of(token.token_id)
        top = None
        if token.logprob is not None and num_top:
            top = {text_of(token_id): finite(logprob) for token_id, logprob in token.top[:num_top]}
            top.setdefault(text, finite(token.logprob))
        found["tokens"].append(text)
        found["token_logprobs"].append(None if token.logprob is None else finite(token.logprob))
        found["top_logprobs"].append(top)
        found["text_offset"].append(offset)
        offset += len(text)
    return {**found, "top_logprobs": found["top_logprobs"] if num_top else None}


def native_logprobs(tokens: Iterable[TokenLogprobs], text_of: TokenText | None) -> list[list[Any]]:
    """``[logprob, token_id, text or None]`` per token."""
    return [_native(token.token_id, token.logprob, text_of) for token in tokens]


def native_top_logprobs(tokens: Iterable[TokenLogprobs], text_of: TokenText | None) -> list[list[list[Any]] | None]:
    """Per token its likeliest rivals, in the form of ``native_logprobs``; None where the model predicts nothing."""
    return [
        None if token.logprob is None else [_native(token_id, logprob, text_of) for token_id, logprob in token.top]
        for token in tokens
    ]


def _native(token_id: int, logprob: float | None, text_of: TokenText | None) -> list[Any]:
    return [None if logprob is None else finite(logprob), token_id, text_of(token_id) if text_of else None]
