"""The engine on a simulated GPU: recorded decode steps, copies that nobody waits for, and everything beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.config.engine_config import EngineConfig
from nextn.errors import ConfigError
from nextn.execution.decode_runner import DecodeRunner, Masks
from nextn.execution.engine import Engine
from nextn.protocol.messages import AddRequest
from nextn.protocol.ranks import DecodeBatch
from nextn.text.grammar import regex_form

from tests.checkpoints import END_OF_LETTERS, said_in_letters, tiny_config, write_checkpoint, write_letters
from tests.conftest import request, run_all
from tests.gpu.checks import check_adds_up, logged_plan
from tests.simulated_cuda import SimulatedCuda

CONFIG = tiny_config(
    vocab_size=40,
    eos_token_id=[END_OF_LETTERS],
    num_hidden_layers=1,
    head_dim=32,
    max_position_embeddings=256,
    moe_intermediate_size=32,
    intermediate_size=96,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
CODE = regex_form("[ab][0-9]{3}!", "regex", str).as_grammar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_letters(write_checkpoint(tmp_path_factory.mktemp("simulated"), CONFIG, quant="channel"))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    pytest.importorskip("triton")
    with SimulatedCuda(monkeypatch) as mode:
        yield mode


@pytest.fixture
def not_recorded(monkeypatch: pytest.MonkeyPatch) -> list[DecodeBatch]:
    """Decode steps for which there was no recording."""
    found: list[DecodeBatch] = []
    launch = DecodeRunner.launch

    def watched(self: DecodeRunner, batch: DecodeBatch, masks: Masks | None = None) -> Any:
        size = next((size for size in self._sizes if size >= len(batch.slots)), 0)
        if (size, batch.num_drafts, batch.is_greedy) not in self._recordings:
            found.append(batch)
        return launch(self, batch, masks)

    monkeypatch.setattr(DecodeRunner, "launch", watched)
    return found


def engine_on_gpu(folder: Path, **options: Any) -> Engine:
    defaults = {"max_running_requests": 3, "page_size": 8, "chunked_prefill_size": 16, "max_total_tokens": 512}
    values = {"model_path": str(folder), "device": "cuda", "canary": "off", **defaults, **options}
    return Engine(EngineConfig(**values))


def some_requests() -> list[AddRequest]:
    return [
        request("greedy", [3, 9, 1, 22], 8),
        request("long", [i % 31 for i in range(40)], 5),
        request("seeded", [4, 9, 1], 7, temperature=0.9, top_k=7, top_p=0.9, min_p=0.05, has_own_seed=True, seed=5),
        request("ruled", [5, 7, 7], 6, presence_penalty=0.4, logit_bias={3: 1.0}, min_new_tokens=3),
    ]


def test_recorded_steps_decide_what_steps_launched_one_by_one_decide(
    folder: Path, simulated: SimulatedCuda, not_recorded: list[DecodeBatch]
) -> None:
    """More requests than slots, chunked prompts, and the next step launched before the last is read."""
    recorded = engine_on_gpu(folder, num_draft_steps=1, max_running_requests=2)
    tokens = run_all(recorded, some_requests())
    assert simulated.num_replays > 5
    assert not not_recorded
    plain = engine_on_gpu(
        folder, num_draft_steps=1, max_running_requests=2, enable_cuda_graph=False, enable_overlap=False
    )
    assert run_all(plain, some_requests()) == tokens
    assert len(not_recorded) > 5


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_grammar_holds_and_its_steps_are_recorded(
    folder: Path, simulated: SimulatedCuda, not_recorded: list[DecodeBatch], temperature: float
) -> None:
    """Also where it drafts nothing, though a number of drafts is fixed."""
    engine = engine_on_gpu(folder, num_draft_steps=1, max_running_requests=1)
    held = request("held", [3, 9, 1], 8, grammar=CODE, ignore_eos=False, temperature=temperature)
    said = said_in_letters(run_all(engine, [held])["held"])
    assert len(said) == 5
    assert said[0] in "ab"
    assert said[-1] == "!"
    assert not not_recorded


def test_where_recording_fails_no_graph_keeps_what_it_recorded(
    folder: Path, simulated: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the error has the graphs, and while they hold its operations a group of ranks cannot be aborted."""
    graphs: list[Any] = []
    make, run = torch.cuda.CUDAGraph, DecodeRunner._run

    def make_another() -> Any:
        graphs.append(make())
        return graphs[-1]

    def run_or_fail(self: DecodeRunner, rows: torch.Tensor, batch: DecodeBatch) -> torch.Tensor:
        decided = run(self, rows, batch)
        if len(graphs) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decided

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_another)
    monkeypatch.setattr(DecodeRunner, "_run", run_or_fail)
    with pytest.raises(ConfigError, match="--cuda-graph-max-bs"):
        engine_on_gpu(folder, num_draft_steps=0)
    assert len(graphs) == 2
    assert not any(graph.holds_operations for graph in graphs)


def test_the_memory_plan_is_logged_and_adds_up(
    folder: Path, simulated: SimulatedCuda, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nextn"):
        engine_on_gpu(folder, num_draft_steps=0, enable_cuda_graph=False, max_total_tokens=64)
    check_adds_up(logged_plan(caplog))
