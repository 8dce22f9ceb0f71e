"""From what a client calls a prompt to token ids, without blocking the event loop on long texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from nextn.server.errors import invalid
from nextn.server.generating import Prompt
from nextn.server.sampling import check_count, check_token_ids, context_limit, over_context
from nextn.server.services import Services

T = TypeVar("T")

LONG_TEXT = 8192
"""Characters (or tokens) from which tokenizing goes to a thread: below, the hand-over costs more than the work."""

MAX_BATCH = 1024
"""Prompts in one request."""


async def maybe_in_thread(size: int, work: Callable[[], T]) -> T:
    """Run ``work`` here if there is little of it, else in a thread."""
    return work() if size < LONG_TEXT else await asyncio.to_thread(work)


def is_batch(given: str | Sequence[str | int | list[int]]) -> bool:
    """Whether it is a list of prompts, and not one text or the ids of one."""
    return not isinstance(given, str) and bool(given) and not isinstance(given[0], int)


async def read_prompts(services: Services, given: str | Sequence[str | int | list[int]], param: str) -> list[Prompt]:
    """A text, token ids, or a list of either, as prompts; every id and count is checked."""
    if isinstance(given, str):
        return await _from_texts(services, [given], param)
    if not given:
        raise invalid(f"'{param}' is empty; give at least one prompt or token.", param, "invalid_value")
    limit = context_limit(services.engine.require_ready())
    if isinstance(given[0], int) and len(given) > limit:  # before anything looks at each of them
        raise over_context(f"The prompt has {len(given)} tokens", limit, param)
    if all(isinstance(item, int) for item in given):
        return [_from_ids(services, [item for item in given if isinstance(item, int)], param)]
    check_count(given, MAX_BATCH, param)
    of_texts = iter(await _from_texts(services, [item for item in given if isinstance(item, str)], param))
    prompts = []
    for index, item in enumerate(given):
        if isinstance(item, int):
            raise invalid(f"'{param}' mixes token ids with other prompts.", f"{param}[{index}]", "invalid_value")
        prompts.append(next(of_texts) if isinstance(item, str) else _from_ids(services, item, f"{param}[{index}]"))
    return prompts


async def _from_texts(services: Services, texts: list[str], param: str) -> list[Prompt]:
    if not texts:
        return []
    tokenizer = services.require_tokenizer(param, "use 'input_ids'")
    found = await maybe_in_thread(sum(map(len, texts)), lambda: tokenizer.encode_batch(texts))
    return [Prompt(token_ids=ids, text=text) for ids, text in zip(found, texts, strict=True)]


def _from_ids(services: Services, token_ids: list[int], param: str) -> Prompt:
    check_token_ids(token_ids, services.engine.require_ready().vocab_size, param)
    return Prompt(token_ids=token_ids)
