"""Prompts: seeded, and of exactly the token lengths asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nextn.bench.errors import BenchError
from nextn.bench.options import BenchOptions
from nextn.bench.tokenizer import Tokenizer, count_tokens
from nextn.bench.types import BenchRequest


def text_of_len(tokenizer: Tokenizer, num_tokens: int, rng: np.random.Generator, ids: list[int] | None = None) -> str:
    """Text that encodes to exactly num_tokens; starts from ids if given, else from random vocabulary.

    Raises BenchError if the tokenizer does not reach that length.
    """
    special = set(tokenizer.all_special_ids)

    def random_ids(count: int) -> list[int]:
        return [int(i) for i in rng.integers(0, len(tokenizer), count) if int(i) not in special]

    current = list(ids or [])[:num_tokens]
    for _ in range(200):
        while len(current) < num_tokens:
            current += random_ids(num_tokens - len(current))
        text = tokenizer.decode(current).replace("\ufffd", "")
        current = tokenizer.encode(text, add_special_tokens=False)
        if len(current) == num_tokens:
            return text
        # Cut below the target now and then, so that a tail that re-encodes badly is replaced.
        if len(current) > num_tokens:
            current = current[: max(0, num_tokens - int(rng.integers(0, 3)))]
    raise BenchError(f"could not make text of exactly {num_tokens} tokens with this tokenizer; use random-ids")


def _lengths(rng: np.random.Generator, longest: int, ratio: float, count: int) -> list[int]:
    return [int(n) for n in rng.integers(max(1, int(longest * ratio)), longest + 1, count)]


def _read_conversations(path: str) -> list[tuple[str, str]]:
    file = Path(path)
    if not file.is_file():
        file = _download(path)
    try:
        content = file.read_text(encoding="utf-8")
        if content.lstrip().startswith("["):
            rows = json.loads(content)
        else:
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise BenchError(f"{path}: not a JSON list and not JSONL: {error}") from error
    pairs = []
    for row in rows:
        texts = _texts_of(row)
        if len(texts) == 2 and all(texts):
            pairs.append((texts[0], texts[1]))
    if not pairs:
        raise BenchError(f"{path}: no row has conversations with two non-empty turns")
    return pairs


def _texts_of(row: Any) -> list[str]:
    """The texts of a conversation's first two turns; empty where there is none."""
    fields = row if isinstance(row, dict) else {}
    turns = fields.get("conversations") or fields.get("conversation") or fields.get("messages")
    texts = [
        turn.get("value") or turn.get("content") if isinstance(turn, dict) else None
        for turn in (turns if isinstance(turns, list) else [])[:2]
    ]
    return [text if isinstance(text, str) else "" for text in texts]


def _download(path: str) -> Path:
    """Fetch "owner/dataset/file" from the hub; only reached when --dataset-path names no local file."""
    parts = path.split("/", 2)
    if len(parts) < 3 or path.startswith(("/", ".")):
        raise BenchError(f"--dataset-path {path}: no such file; pass a JSON list or JSONL with conversations")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except Exception as error:  # network, authorization and name errors all mean the same to the user
        raise BenchError(
            f"--dataset-path {path}: no such file, and the hub did not give it ({type(error).__name__}); "
            "download it yourself and pass the local path"
        ) from error


def _render(tokenizer: Tokenizer, text: str, options: BenchOptions) -> str:
    if not options.apply_chat_template:
        return text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


def make_requests(options: BenchOptions, tokenizer: Tokenizer | None, vocab_size: int | None) -> list[BenchRequest]:
    """The run's requests, the same for the same options and tokenizer.

    Raises BenchError if the dataset needs something that is not there.
    """
    rng = np.random.default_rng(options.seed)
    if options.dataset_name == "random-ids":
        return _random_ids(options, tokenizer, vocab_size, rng)
    if options.dataset_name == "sharegpt" and not options.dataset_path:
        raise BenchError("--dataset-name sharegpt needs --dataset-path FILE (JSON list or JSONL with conversations)")
    if tokenizer is None:
        raise BenchError(
            f"--dataset-name {options.dataset_name} needs a tokenizer; pass --tokenizer FOLDER, or use random-ids"
        )
    if options.dataset_name == "sharegpt":
        return _sharegpt(options, tokenizer, rng)
    if options.dataset_name == "generated-shared-prefix":
        return _shared_prefix(options, tokenizer, rng)
    return _random(options, tokenizer, rng)


def _random_ids(
    options: BenchOptions, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[BenchRequest]:
    if options.backend.endswith("-chat"):
        raise BenchError(f"--dataset-name random-ids: {options.backend} takes no token ids; use random")
    size = len(tokenizer) if tokenizer is not None else vocab_size
    if not size:
        raise BenchError("random-ids: the vocabulary size is unknown; pass --tokenizer FOLDER")
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    allowed = np.array([i for i in range(size) if i not in special])
    inputs = _lengths(rng, options.random_input_len, options.random_range_ratio, options.num_prompts)
    outputs = _lengths(rng, options.random_output_len, options.random_range_ratio, options.num_prompts)
    return [BenchRequest(n, m, input_ids=rng.choice(allowed, n).tolist()) for n, m in zip(inputs, outputs, strict=True)]


def _random(options: BenchOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> list[BenchRequest]:
    inputs = _lengths(rng, options.random_input_len, options.random_range_ratio, options.num_prompts)
    outputs = _lengths(rng, options.random_output_len, options.random_range_ratio, options.num_prompts)
    pairs = _read_conversations(options.dataset_path) if options.dataset_path else []
    requests = []
    for index, (input_len, output_len) in enumerate(zip(inputs, outputs, strict=True)):
        ids: list[int] | None = None
        if pairs:
            ids = tokenizer.encode(pairs[index % len(pairs)][0], add_special_tokens=False)
            ids = ids * (input_len // max(1, len(ids)) + 1)
        text = _render(tokenizer, text_of_len(tokenizer, input_len, rng, ids), options)
        length = count_tokens(tokenizer, text) if options.apply_chat_template else input_len
        requests.append(BenchRequest(length, output_len, text=text))
    return requests


def _sharegpt(options: BenchOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> list[BenchRequest]:
    assert options.dataset_path is not None
    pairs = _read_conversations(options.dataset_path)
    requests: list[BenchRequest] = []
    for index in rng.permutation(len(pairs)):
        if len(requests) == options.num_prompts:
            break
        prompt, answer = pairs[int(index)]
        text = _render(tokenizer, prompt, options)
        output_len = options.sharegpt_output_len or max(1, count_tokens(tokenizer, answer))
        requests.append(BenchRequest(count_tokens(tokenizer, text), output_len, text=text))
    if len(requests) < options.num_prompts:
        raise BenchError(
            f"{options.dataset_path} has {len(requests)} usable conversations; --num-prompts asks {options.num_prompts}"
        )
    return requests


def _shared_prefix(options: BenchOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> list[BenchRequest]:
    """Groups of questions after a shared system prompt; the two parts have the exact lengths, their join nearly so."""
    requests: list[BenchRequest] = []
    for _ in range(options.gsp_num_groups):
        system = text_of_len(tokenizer, options.gsp_system_prompt_len, rng)
        for _ in range(options.gsp_prompts_per_group):
            question = text_of_len(tokenizer, options.gsp_question_len, rng)
            text = _render(tokenizer, f"{system}\n\n{question}", options)
            requests.append(BenchRequest(count_tokens(tokenizer, text), options.gsp_output_len, text=text))
    return [requests[int(i)] for i in rng.permutation(len(requests))]
