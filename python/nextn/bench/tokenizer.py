"""The tokenizer as the benchmark needs it."""

from typing import Any, Protocol, cast

from nextn.bench.errors import BenchError


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    all_special_ids: list[int]

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by folder or hub name. Raises BenchError if that is not possible."""
    try:
        from transformers import AutoTokenizer

        return cast(Tokenizer, AutoTokenizer.from_pretrained(name))  # type: ignore[no-untyped-call,unused-ignore]
    except Exception as error:  # the library raises many kinds; each means that there is no tokenizer
        first = (str(error).strip().splitlines() or [""])[0]
        raise BenchError(
            f"no tokenizer at {name!r} ({type(error).__name__}: {first}); pass --tokenizer with a folder that has "
            "tokenizer.json, or use --dataset-name random-ids"
        ) from error


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of text, without special tokens added."""
    return len(tokenizer.encode(text, add_special_tokens=False))
