"""Fixtures shared by all tests: small real checkpoints, and engines over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before nextn is imported

from nextn.config.engine_config import EngineConfig
from nextn.execution.engine import Engine
from nextn.protocol.messages import AddRequest, RequestOutput
from nextn.protocol.sampling import TokenSampling

from tests.checkpoints import tiny_config, write_checkpoint
from tests.interpreter import stand_in_for_a_gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` chooses the tests that run on a GPU where there is one. NEXTN_TESTS_NEED_GPU: there must be one."""
    if "NEXTN_TESTS_NEED_GPU" in os.environ and not torch.cuda.is_available():
        raise pytest.UsageError("NEXTN_TESTS_NEED_GPU is set, and torch finds no GPU")
    for item in items:
        if {"device", "cuda"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)


torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for what only a GPU can show."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and torch's CUDA build")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FP8 checkpoint with a NextN layer. Its vocabulary is small, so that random drafts are often right."""
    config = tiny_config(vocab_size=24, num_nextn_predict_layers=1, max_position_embeddings=512)
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), config, quant="channel")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN or of the largest integer, so that an element nobody wrote shows."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public function imports torch's compiler first
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> torch.device:
    """Where Triton's kernels run: the GPU if there is one, else the CPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    stand_in_for_a_gpu(monkeypatch)
    return torch.device("cpu")


EngineFactory = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(tiny_checkpoint: Path) -> EngineFactory:
    """Builds an engine over the tiny checkpoint, on the CPU; keyword arguments are EngineConfig's."""

    def make(**options: Any) -> Engine:
        defaults = {
            "model_path": str(tiny_checkpoint),
            "device": "cpu",
            "max_running_requests": 16,
            "num_draft_steps": 3,
        }
        return Engine(EngineConfig(**{**defaults, **options}))

    return make


def request(rid: str, prompt: list[int], max_new_tokens: int = 24, **fields: Any) -> AddRequest:
    """A request with greedy sampling unless ``fields`` says otherwise; engine fields go by their own names."""
    of_request = {k: fields.pop(k) for k in AddRequest.__struct_fields__ if k in fields}
    values = {"temperature": 0.0, "seed": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens, **fields}
    return AddRequest(rid=rid, input_ids=prompt, sampling=TokenSampling(**values), **of_request)


def run_all(engine: Engine, requests: list[AddRequest]) -> dict[str, list[int]]:
    """Add the requests together, run to the end, check that nothing leaked. Returns output tokens by rid."""
    return {rid: [t for o in outputs for t in o.token_ids] for rid, outputs in run_outputs(engine, requests).items()}


def run_outputs(
    engine: Engine, requests: list[AddRequest], known: list[str] | None = None
) -> dict[str, list[RequestOutput]]:
    """As run_all, with every output message. known: requests that have been added already"""
    found: dict[str, list[RequestOutput]] = {rid: [] for rid in [*(known or ()), *(r.rid for r in requests)]}
    for one in requests:
        refusal = engine.add(one)
        assert refusal is None, refusal
    while engine.has_work:
        for output in engine.step():
            found[output.rid].append(output)
        engine.scheduler.check()
    assert all(outputs[-1].finish_reason is not None for outputs in found.values())
    pages = engine.scheduler.pages
    assert pages.num_available == pages.num_pages, "pages leaked"
    return found
