"""Documents into rows of tokens. A batch is a function of (seed, step) alone, so a resumed run sees the same ones."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from nextn.demo.chat_template import Span
from nextn.demo.corpus.stream import document

ROW_LEN = 512
LONG_ROW_LEN = 2048
LONG_ROW_EVERY = 10
"""One batch in ten has rows of LONG_ROW_LEN, so that the model meets long contexts."""

_DOCUMENTS_PER_STEP = 1 << 16


@dataclass(frozen=True)
class Batch:
    """tokens: [num_rows, row_len] int64. weights: [num_rows, row_len] float32, what predicting that token counts."""

    tokens: torch.Tensor
    weights: torch.Tensor


def encode(tokenizer: Tokenizer, documents: list[list[Span]]) -> list[tuple[list[int], list[float]]]:
    """Token ids and per-token weights; a token takes the weight of the span in which it starts."""
    texts = ["".join(span.text for span in spans) for spans in documents]
    encoded = []
    for spans, encoding in zip(documents, tokenizer.encode_batch(texts), strict=True):
        ends, position = [], 0
        for span in spans:
            position += len(span.text)
            ends.append(position)
        weights, current = [], 0
        for start, _ in encoding.offsets:
            while start >= ends[current]:
                current += 1
            weights.append(spans[current].weight)
        encoded.append((encoding.ids, weights))
    return encoded


def make_batch(tokenizer: Tokenizer, seed: int, step: int, num_tokens: int) -> Batch:
    """The batch of a step: rows that start with a document and hold whole documents, padded with <|endoftext|>."""
    row_len = LONG_ROW_LEN if step % LONG_ROW_EVERY == LONG_ROW_EVERY - 1 else ROW_LEN
    num_rows = num_tokens // row_len
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in range(num_rows)]
    index, misses = step * _DOCUMENTS_PER_STEP, 0
    while misses < 8:
        documents = [document(seed, index + offset) for offset in range(16)]
        index += len(documents)
        for ids, weights in encode(tokenizer, documents):
            ids, weights = ids[:row_len], weights[:row_len]
            row = next((row for row in rows if len(row[0]) + len(ids) <= row_len), None)
            if row is None:
                misses += 1
            else:
                row[0].extend(ids)
                row[1].extend(weights)
    pad = tokenizer.token_to_id("<|endoftext|>")
    tokens = torch.tensor([ids + [pad] * (row_len - len(ids)) for ids, _ in rows], dtype=torch.int64)
    loss_weights = torch.tensor([weights + [0.0] * (row_len - len(weights)) for _, weights in rows])
    loss_weights[:, 0] = 0.0
    return Batch(tokens, loss_weights)
