"""The tokenizer: byte-level BPE with single digits, and GLM's special tokens at the end of the vocabulary."""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from nextn.demo.corpus.stream import document

VOCAB_SIZE = 2560

SPECIAL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "/nothink",
]  # fmt: skip
"""Tokens that `skip_special_tokens` removes."""

MARKUP_TOKENS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>",
]  # fmt: skip
"""Tokens that stay in decoded text, because parsers look for them there."""

EOS_TOKENS = ["<|endoftext|>", "<|user|>", "<|observation|>"]

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _plain_text(seed: int, num_documents: int) -> Iterator[str]:
    """Documents without their special tokens, which BPE must not learn."""
    for index in range(num_documents):
        text = "".join(span.text for span in document(seed, index))
        for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
            text = text.replace(token, "\n")
        yield text


def train_tokenizer(seed: int, num_documents: int = 12_000) -> Tokenizer:
    """A tokenizer of exactly VOCAB_SIZE tokens, trained on the first documents of the corpus."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain_text(seed, num_documents), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} were expected")
    return tokenizer
