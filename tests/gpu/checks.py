"""What the GPU path is held to; the same checks run on a CPU, so that they themselves are tried."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from nextn.checkpoint.dummy import fill_dummy
from nextn.config.model_config import ModelConfig
from nextn.execution.engine import Engine
from nextn.execution.memory import MemoryPlan, make_kv_cache
from nextn.kernels import gpu
from nextn.layers.batch import make_extend_batch
from nextn.layers.prepare import prepare_weights
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.quantization.detect import detect_quantization

from tests.conftest import request, run_all

CPU = torch.device("cpu")
PAGE_SIZE = 16
STEPS = ([(0, 9), (0, 1), (0, 37)], [(9, 1), (1, 4), (37, 3)])
"""Extends of three sequences, one after the other: first new position and number of new tokens."""


@contextmanager
def cpu_path() -> Iterator[None]:
    """Within it CPU tensors are computed as on a machine without a GPU."""
    with mock.patch.object(gpu, "suits", return_value=False):
        yield


def random_pair(raw: dict[str, Any], device: torch.device) -> tuple[Glm4MoeForCausalLM, Glm4MoeForCausalLM]:
    """The same random weights twice: on the device in bfloat16 and as stored, and on the CPU expanded to float32."""
    config = ModelConfig.from_dict(raw)
    quantization = detect_quantization(Path(), config.quantization_config)
    with device:
        ours = Glm4MoeForCausalLM(config, quantization, dtype=torch.bfloat16)
    fill_dummy(ours.weight_slots(), seed=0)
    reference = Glm4MoeForCausalLM(config, quantization, dtype=torch.float32)
    for source, target in zip(ours.weight_slots(), reference.weight_slots(), strict=True):
        assert source.name == target.name
        target.view.copy_(source.view)
    prepare_weights(ours)
    with cpu_path():
        prepare_weights(reference)
    return ours, reference


@torch.inference_mode()
def logits_of(model: Glm4MoeForCausalLM, device: torch.device) -> torch.Tensor:
    """Of all tokens of STEPS, over one KV pool. Returns [T, vocab_size] float32 on the CPU."""
    config = model.config
    tables, first = [], 0
    for start, length in STEPS[-1]:
        num_pages = -(-(start + length) // PAGE_SIZE)
        tables.append(range(first, first + num_pages))
        first += num_pages
    kv_cache = make_kv_cache(
        config,
        num_layers=config.num_hidden_layers,
        num_pages=first,
        page_size=PAGE_SIZE,
        dtype=model.dtype,
        device=device,
    )
    draw = torch.Generator().manual_seed(1)
    logits = []
    for spans in STEPS:
        num_tokens = sum(length for _, length in spans)
        ids = torch.randint(config.vocab_size, (num_tokens,), generator=draw).to(device)
        batch = make_extend_batch(spans, tables, PAGE_SIZE, device)
        logits.append(model.compute_logits(model.forward(ids, batch, kv_cache)).cpu())
    return torch.cat(logits)


def check_logits(raw: dict[str, Any], device: torch.device, tolerance: float) -> None:
    """How far tokens' logits are from the CPU path's, as a share of their length as vectors.

    tolerance: for half of the tokens; four times that for all, as rounding weighs more where attention is sharp
    """
    ours, reference = random_pair(raw, device)
    got = logits_of(ours, device)
    with cpu_path():
        expected = logits_of(reference, CPU)
    assert bool(got.isfinite().all())
    off = (got - expected).norm(dim=1) / expected.norm(dim=1)
    figures = f"off by {float(off.median()):.4f} in the median, {float(off.max()):.4f} at worst; allowed {tolerance:g}"
    print(figures)
    assert float(off.median()) <= tolerance, figures
    assert float(off.max()) <= 4 * tolerance, figures


def prompts_of(num: int, vocab_size: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (5 + 9 * i,), generator=draw).tolist() for i in range(num)]


def answers(engine: Engine, seed: int, num: int = 5, **fields: Any) -> dict[str, list[int]]:
    """Of random prompts, all at once, as many tokens of each as its number says."""
    prompts = prompts_of(num, engine.vocab_size, seed)
    return run_all(engine, [request(str(i), ids, 12 + 7 * i, **fields) for i, ids in enumerate(prompts)])


def check_same_answers(make_engine: Callable[..., Engine], ways: list[dict[str, Any]]) -> None:
    """Every way to run the engine gives the same greedy tokens."""
    expected = answers(make_engine(**ways[0]), seed=0)
    for way in ways[1:]:
        assert answers(make_engine(**way), seed=0) == expected, way


def check_new_requests_are_seen(
    make_engine: Callable[..., Engine], options: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Requests that follow others get the answers that they get alone, greedy and sampled."""
    engine = make_engine(**options)
    for seed, fields in enumerate([{}, {"temperature": 0.8}, {}, {"temperature": 1.2, "top_k": 20}]):
        found = answers(engine, seed, seed + 2, **fields)
        assert found == answers(make_engine(**plain), seed, seed + 2, **fields), f"group {seed}, {fields}"


def logged_plan(caplog: pytest.LogCaptureFixture) -> str:
    """The memory plan, of which every row is a line of the log."""
    lines = [record.getMessage() for record in caplog.records]
    first = next(i for i, line in enumerate(lines) if line.startswith("GPU memory"))
    return "\n".join(lines[first : first + len(some_plan().as_table().splitlines())])


def check_adds_up(table: str) -> None:
    """The parts of a memory plan, as an operator reads it, are the whole card."""
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB", table)]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", table)]
    assert len(sizes) == 7
    assert abs(sizes[0] - sum(sizes[1:])) <= 0.005 * len(sizes), "each is rounded to 0.01"
    assert abs(100 - sum(shares)) <= 0.05 * len(shares), "each is rounded to 0.1"


def some_plan() -> MemoryPlan:
    gib = 1 << 30
    return MemoryPlan(80 * gib, 0.9, gib, 50 * gib, 3 * gib + 12345, 2 * gib)
