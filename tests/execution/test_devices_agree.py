"""A GPU's code paths over tensors that have a device, a shape and a type but no values (torch's fake tensors).

No GPU is needed to see that no two devices meet in one operation, and that a decode step asks the host for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint import loader
from nextn.config.engine_config import EngineConfig
from nextn.execution.memory import make_kv_cache
from nextn.kernels import gpu
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Extend, Scheduler, SchedulerConfig
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.decode_step import DecodeRows, DecodeStep
from nextn.speculative.grammar import Grammars
from nextn.speculative.proposer import NextNProposer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import checkpoints
from tests.checkpoints import tiny_config, write_checkpoint
from tests.conftest import request
from tests.without_cuda import AllZero, WithoutCuda

CUDA = torch.device("cuda")
PAGE_SIZE, NUM_PAGES, NUM_SLOTS = 4, 40, 4


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all kernels that would have been launched."""
    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        assert all(one.is_cuda for one in tensors), f"{kernel.__name__}: a tensor is on the CPU"
        names.append(kernel.__name__)

    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(gpu, "suits", lambda *tensors: all(x is None or x.is_cuda for x in tensors))
    monkeypatch.setattr(gpu, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(gpu, "has_descriptors", lambda device: False)
    monkeypatch.setattr(gpu, "starts_early", lambda device: False)
    monkeypatch.setattr(gpu, "num_processors", lambda device: 132)
    monkeypatch.setattr(gpu, "shared_memory", lambda device: 227 * 1024)
    return names


@pytest.fixture(scope="module", params=["channel", "block", "none"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks are as wide as the kernels for GPUs take them."""
    config = tiny_config(vocab_size=40, max_position_embeddings=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "BLOCK", (32, 32))
        return write_checkpoint(tmp_path_factory.mktemp("fake"), config, quant=request.param)


@pytest.fixture
def parts(
    folder: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Glm4MoeForCausalLM, NextNProposer, KVCache]]:
    """A model on a GPU without values, while the fixture is in use."""
    monkeypatch.setattr(loader, "_fill", lambda *arguments, **options: None)  # there are no values to write
    config = EngineConfig(model_path=str(folder))
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCuda(), torch.inference_mode():
        loaded = loader.load_model(config, device=CUDA, dtype=torch.bfloat16, want_draft=True)
        kv_cache = make_kv_cache(
            loaded.model_config,
            num_layers=loaded.model_config.num_hidden_layers + 1,
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            dtype=torch.bfloat16,
            device=CUDA,
        )
        assert loaded.draft is not None
        yield loaded.target, NextNProposer(loaded.draft, kv_cache), kv_cache


def _state() -> DecodeState:
    return DecodeState(
        num_slots=NUM_SLOTS,
        vocab_size=40,
        context_length=128,
        max_drafts=5,
        page_size=PAGE_SIZE,
        scratch_page=NUM_PAGES,
        device=CUDA,
    )


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_decode_step_stays_on_the_device(
    parts: tuple[Glm4MoeForCausalLM, NextNProposer, KVCache], launched: list[str], num_drafts: int, is_greedy: bool
) -> None:
    target, proposer, kv_cache = parts
    step = DecodeStep(target, proposer, kv_cache, _state())
    rows = DecodeRows(*torch.zeros(3, NUM_SLOTS, dtype=torch.int64, device=CUDA).unbind())
    decided = step.run(rows, num_drafts, is_greedy=is_greedy)
    assert decided.is_cuda
    assert decided.shape == (NUM_SLOTS, num_drafts + 1)
    assert len(launched) > 20


class _TorchKernels(TorchDispatchMode):
    """The names of torch's operations that launch a kernel: all but views, fresh memory, and what computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **options)
        with self:
            parts = func.decompose(*args, **options)  # into what is counted itself, where it is made of others
        if parts is not NotImplemented:
            return parts
        out = func(*args, **options)
        name = func.overloadpacket.__name__
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda and x.numel() for x in made) and not func.is_view and "empty" not in name:
            self.names.append(name)
        return out


PER_LAYER = 13
PER_STEP = 7
"""Layout, final norm, head, choice in three, commit."""
PER_DRAFT = 6
"""Norms' factors, projection, final norm, head, choice in two."""
TO_SAMPLE = 6
"""So many more per choice."""


@pytest.mark.parametrize("folder", ["channel", "block"], indirect=True)
@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("num_drafts", [0, 1, 3, 5])
def test_a_decode_step_is_few_launches(
    parts: tuple[Glm4MoeForCausalLM, NextNProposer, KVCache], launched: list[str], num_drafts: int, is_greedy: bool
) -> None:
    """A launch takes as long as reading 7 MB, so a step's bookkeeping must not become many again.

    Torch gathers embeddings and stores hidden states. For drafts it gathers hidden states, and the rows that are read
    of queries and of the residual stream, marks the chains' ends, and puts each draft behind its root.
    """
    target, proposer, kv_cache = parts
    step = DecodeStep(target, proposer, kv_cache, _state())
    rows = DecodeRows(*torch.zeros(3, NUM_SLOTS, dtype=torch.int64, device=CUDA).unbind())
    launched.clear()
    with _TorchKernels() as by_torch:
        step.run(rows, num_drafts, is_greedy=is_greedy)
    assert len(by_torch.names) <= (6 + num_drafts if num_drafts else 2), by_torch.names
    num_layers = target.config.num_hidden_layers + num_drafts
    to_sample = 0 if is_greedy else TO_SAMPLE * (num_drafts + 1)
    assert len(launched) <= PER_LAYER * num_layers + PER_STEP + PER_DRAFT * num_drafts + to_sample, launched


def test_asking_for_a_value_would_show(parts: object) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.zeros(3, device=CUDA).tolist()


ASKS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {"temperature": 1.0, "presence_penalty": 0.5, "logit_bias": {3: 1.0}, "min_new_tokens": 20},
    {"num_top_logprobs": 2, "prompt_logprobs_start": 0},
]


def test_steps_with_prompts_keep_to_one_device(
    parts: tuple[Glm4MoeForCausalLM, NextNProposer, KVCache], launched: list[str]
) -> None:
    target, proposer, kv_cache = parts
    cycle = SpeculativeCycle(target, proposer, kv_cache, page_size=PAGE_SIZE, grammars=Grammars(None, 0))
    config = SchedulerConfig(
        max_running=NUM_SLOTS,
        max_queued=9,
        max_prefill_tokens=9,
        context_length=128,
        num_drafts=3,
        by_priority=False,
        eos_token_ids=(1,),
    )
    scheduler = Scheduler(config, KVPages(NUM_PAGES, PAGE_SIZE))
    for i, asks in enumerate(ASKS):
        scheduler.add(request(str(i), [5, 6, 7, 8, 9, 10, 11], max_new_tokens=12, **asks))
    steps: list[list[Extend]] = []
    with AllZero():
        while scheduler.has_work and len(steps) < 30:
            steps.append(scheduler.schedule())
            for extend, decision in zip(steps[-1], cycle.run(steps[-1]), strict=True):
                scheduler.commit(extend, decision)
    assert any(extend.num_drafts for extends in steps for extend in extends)
    assert any(len(extends) == NUM_SLOTS for extends in steps)
