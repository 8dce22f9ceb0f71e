"""The checkpoint's tokenizer and chat template, through transformers (its tokenizers import no torch)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from nextn.errors import CheckpointError, ConfigError, RequestError

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back.

    folder: holds tokenizer.json, and tokenizer_config.json and chat_template.jinja where there are any
    chat_template: a Jinja file to use instead of the checkpoint's
    Raises CheckpointError or ConfigError if a file is missing or cannot be read.
    """

    def __init__(self, folder: str | Path, chat_template: str | Path | None = None) -> None:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: has no tokenizer.json; give --tokenizer-path a folder that has one, or pass "
                "--skip-tokenizer-init to serve token ids only"
            )
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises bare Exception for a malformed tokenizer.json
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        added = self.backend.get_added_tokens_decoder()
        self._added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_of_character = _byte_level_alphabet() if _is_byte_level(self.backend) else {}
        if chat_template is not None:
            self._override_chat_template(Path(chat_template))

    def _override_chat_template(self, file: Path) -> None:
        try:
            self._tokenizer.chat_template = file.read_text(encoding="utf-8")
            self._tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"--chat-template {file}: line {error.lineno}: {error.message}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {file}: cannot be read: {error}") from None
        except _TEMPLATE_ERRORS:
            pass  # a template may refuse this conversation and take the real ones

    @property
    def backend(self) -> BackendTokenizer:
        """The tokenizers library's own object."""
        backend: BackendTokenizer = self._tokenizer.backend_tokenizer
        return backend

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def template_reads(self, variable: str) -> bool:
        """Whether the chat template depends on a variable: what it does not read has no effect."""
        return re.search(rf"\b{variable}\b", str(self._tokenizer.chat_template)) is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` for many. Other threads run meanwhile: the library's call for one text would stop them."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in found]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def decode_batch(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """``decode`` for many. Other threads run meanwhile."""
        return list(self.backend.decode_batch([list(ids) for ids in batch], skip_special_tokens=skip_special_tokens))

    def is_shown(self, token_id: int, skip_special_tokens: bool) -> bool:
        """False if decoding leaves the token out: a special one, or an id that the tokenizer does not know."""
        if skip_special_tokens and token_id in self._special_ids:
            return False
        return self.backend.id_to_token(token_id) is not None

    def added_token_id(self, content: str) -> int | None:
        """The id of a token that was added to the vocabulary whole, such as a tag; None if there is none."""
        token_id: int | None = self.backend.token_to_id(content)
        return token_id if token_id in self._added_tokens else None

    def token_text(self, token_id: int) -> str:
        """One token's text; a part of a character shows as U+FFFD."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, of parts of characters too; empty for an id that the tokenizer does not know."""
        token = self.backend.id_to_token(token_id)
        if token is None or token_id in self._added_tokens:
            return self._added_tokens.get(token_id, "").encode()
        if self._byte_of_character and all(character in self._byte_of_character for character in token):
            return bytes(self._byte_of_character[character] for character in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return self.token_text(token_id).encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Render a conversation in OpenAI's form as the model's prompt.

        kwargs: further template variables, such as enable_thinking
        Raises RequestError if there is no template, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise RequestError(
                "the model has no chat template; use /v1/completions, or pass --chat-template", "messages"
            )
        variables = {name: value for name, value in kwargs.items() if value is not None}
        try:
            rendered = self._tokenizer.apply_chat_template(
                [_with_parsed_arguments(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from None
        return str(rendered)


def _with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI sends the arguments of past tool calls as a JSON string; templates want a mapping.

    Raises RequestError if the string is not a JSON object.
    """
    parsed = dict(message)
    if not message.get("tool_calls"):
        return parsed
    calls = []
    for call in message["tool_calls"]:
        if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
            raise RequestError(f"tool_calls: found {call!r:.200}, expected an object with a function", "messages")
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            found = function.get("arguments")
            raise RequestError(f"tool_calls: arguments: found {found!r:.200}, expected a JSON object", "messages")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    parsed["tool_calls"] = calls
    return parsed


def _is_byte_level(backend: BackendTokenizer) -> bool:
    """True if the characters of tokens stand for bytes, as in GPT-2's and GLM's vocabularies."""
    return isinstance(backend.decoder, decoders.ByteLevel)


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte (Radford et al., 2019): itself where it is printable, else 256 + n."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
