"""The shipped tokenizer: lossless, single digits, GLM's special tokens."""

import pytest
from nextn.demo import checkpoint_dir
from nextn.demo.tokenizer import EOS_TOKENS, MARKUP_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoint_dir())


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces\n\n\tand tabs",
        "naïve café – 漢字 🙂",
        "def f(x):\n    return x ** 2\n",
        "3.14159",
        "",
    ],
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_stand_alone(tokenizer):
    ids = tokenizer("1234567", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == list("1234567")


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, *MARKUP_TOKENS])
def test_each_added_token_is_one_token(tokenizer, token):
    assert len(tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]) == 3


def test_markup_survives_decoding_and_special_tokens_do_not(tokenizer):
    ids = tokenizer("<think>a</think><tool_call>b</tool_call><|user|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>b</tool_call>"


def test_sizes_and_ends(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len({tokenizer.convert_tokens_to_ids(token) for token in EOS_TOKENS}) == 3


def test_encoding_adds_nothing(tokenizer):
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
