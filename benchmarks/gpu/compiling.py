"""Compile GLM-4.5-Air's kernels on all cores before they are needed, as Triton itself would one by one.

Whatever is not met here is compiled in the sections that follow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nextn.config.model_config import ModelConfig
from nextn.kernels import gpu

from benchmarks.gpu.place import Place
from benchmarks.gpu.row import Goal, Outcome, Row
from tests.card import Card
from tests.headers import published_config
from tests.kernels.published import PARTS
from tests.kernels.published.common import META

NUM_TOKENS = (1, 4, 16, 64, 512)
HOPPER = 90
"""What a rehearsal compiles for."""


def measure(place: Place) -> Iterator[Outcome]:
    started = time.monotonic()
    # Kernels of the interpreter cannot be compiled.
    num_kernels, errors = (0, []) if place.way == "triton" else _compile(NUM_TOKENS, is_rehearsal=place.is_rehearsal)
    taken = f"{time.monotonic() - started:.0f} s on {os.cpu_count()} cores"
    yield Row(
        "kernels that do not compile, of GLM-4.5-Air's",
        Goal(at_most=0),
        len(errors),
        f"of {num_kernels}",
        len(errors),
        note="; ".join([taken, *errors])[:300],
        details=tuple({"error": error} for error in errors),
    )


def _compile(num_tokens: tuple[int, ...], *, is_rehearsal: bool) -> tuple[int, list[str]]:
    """How many kernels there are, and why some do not compile. A rehearsal takes few of them."""
    import triton

    config = ModelConfig.from_dict(published_config("glm-4.5-air", "channel"))
    if is_rehearsal:
        triton.runtime.driver.set_active(Card(HOPPER))
    parts, num_tokens = (PARTS[:1], num_tokens[1:2]) if is_rehearsal else (PARTS, num_tokens)
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as compiling:
        for tokens in num_tokens:
            for part in parts:
                for _, call in part.launches(config, tokens, gpu.has_fp8_units(META)):
                    call()
        kernels = list(compiling.future_kernels.values())
        errors = [error for kernel in kernels if (error := _error_of(kernel)) is not None]
        gpu.make_launchers(pool, [asked.kernel for asked in kernels if asked.kernel is not None])
        return len(kernels), errors


def _error_of(kernel: Any) -> str | None:
    try:
        kernel.result()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None
