from __future__ import annotations

import json
from pathlib import Path

import pytest
from nextn.errors import CheckpointError, ConfigError, RequestError
from nextn.text.tokenizer import Tokenizer

from tests.text.conftest import byte_level, write_tokenizer

USER = {"role": "user", "content": "Hi"}


def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    text = "The quick 日本語 fox 🦊\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_skipped_on_request_and_tags_never(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|><think>a")
    assert tokenizer.decode(ids) == "<think>a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|><think>a"


def test_the_vocabulary_counts_added_tokens(tokenizer: Tokenizer) -> None:
    assert max(tokenizer.encode("</arg_value>")) == tokenizer.vocab_size - 1


@pytest.mark.parametrize("text", ["日本 é🦊 \x00\n~", "<think>", "The quick"])
def test_token_bytes_join_to_the_text_also_within_a_character(
    tokenizer: Tokenizer, fallback_tokenizer: Tokenizer, text: str
) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    if " " not in text:
        assert b"".join(map(fallback_tokenizer.token_bytes, fallback_tokenizer.encode(text))) == text.encode()


def test_an_id_beyond_the_vocabulary_has_no_text(tokenizer: Tokenizer) -> None:
    unknown = tokenizer.vocab_size + 5
    assert tokenizer.token_text(unknown) == ""
    assert tokenizer.token_bytes(unknown) == b""
    assert tokenizer.decode([unknown, *tokenizer.encode("a")]) == "a"


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*--tokenizer-path"):
        Tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path)


def test_the_template_renders_a_conversation(tokenizer: Tokenizer) -> None:
    assert tokenizer.apply_chat_template([USER]) == "[gMASK]<sop><|user|>\nHi<|assistant|>"
    assert tokenizer.apply_chat_template([USER], add_generation_prompt=False).endswith("Hi")
    assert tokenizer.apply_chat_template([USER], enable_thinking=False).endswith("<think></think>")
    assert tokenizer.apply_chat_template([USER], enable_thinking=None).endswith("<|assistant|>")


@pytest.mark.parametrize("arguments", ['{"n": 1}', {"n": 1}])
def test_arguments_of_past_calls_reach_the_template_as_a_mapping(tokenizer: Tokenizer, arguments: object) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert "n=1" in tokenizer.apply_chat_template([USER, message])
    assert call["function"] == {"name": "f", "arguments": arguments}, "the caller's message was changed"


@pytest.mark.parametrize(
    "call", [{"function": {"name": "f", "arguments": "[1]"}}, {"function": {"arguments": "{"}}, "f"]
)
def test_arguments_that_are_no_object_are_the_requests_fault(tokenizer: Tokenizer, call: object) -> None:
    with pytest.raises(RequestError, match="tool_calls") as error:
        tokenizer.apply_chat_template([{"role": "assistant", "tool_calls": [call]}])
    assert error.value.param == "messages"


def test_what_the_template_refuses_is_the_requests_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no such role") as error:
        tokenizer.apply_chat_template([{"role": "forbidden", "content": ""}])
    assert error.value.param == "messages"


def test_without_a_template_chat_is_refused(fallback_tokenizer: Tokenizer) -> None:
    assert not fallback_tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        fallback_tokenizer.apply_chat_template([USER])


def test_a_template_file_replaces_the_checkpoints(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level())
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages | length }}")
    assert Tokenizer(folder, file).apply_chat_template([USER]) == "1"
    file.write_text("{{ raise_exception('only real conversations') if messages | length < 2 }}ok")
    assert "ok" in Tokenizer(folder, file).apply_chat_template([USER, USER])


@pytest.mark.parametrize(("content", "complaint"), [("a\n{% if %}", "line 2"), (None, "cannot be read")])
def test_a_template_file_with_an_error_is_refused_at_start(tmp_path: Path, content: str | None, complaint: str) -> None:
    folder = write_tokenizer(tmp_path, byte_level())
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"--chat-template .*{complaint}"):
        Tokenizer(folder, file)


def test_unicode_in_tools_is_rendered_as_json(tmp_path: Path) -> None:
    folder = write_tokenizer(
        tmp_path, byte_level(), "{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "wetter", "description": "für 日本"}}
    assert json.loads(Tokenizer(folder).apply_chat_template([USER], tools=[tool])) == tool
