"""Small real tokenizers on disk: byte-level as GLM's, and with byte fallback as Llama's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nextn.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

SPECIAL = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs: STOP here.",
    "日本語",
)
TEMPLATE = """[gMASK]<sop>
{%- for m in messages -%}
    {%- if m.role == 'forbidden' -%}{{- raise_exception('no such role') -}}{%- endif -%}
    {{- '<|' + m.role + '|>\\n' + (m.content or '') -}}
    {%- for call in m.tool_calls or [] -%}
        {%- for key, value in call.function.arguments.items() -%}{{- key + '=' + value | string -}}{%- endfor -%}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}
{%- endif -%}"""


def write_tokenizer(folder: Path, backend: BackendTokenizer, template: str | None = TEMPLATE) -> Path:
    """A checkpoint's tokenizer files."""
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level() -> BackendTokenizer:
    """GLM's kind: BPE over bytes, special tokens that are skipped and tags that are not."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return backend


def byte_fallback() -> BackendTokenizer:
    """Llama's kind: characters of the vocabulary, bytes for all others."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "é", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    backend = BackendTokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return backend


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("byte_level"), byte_level()))


@pytest.fixture(scope="session")
def fallback_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("byte_fallback"), byte_fallback(), template=None))
