"""Kernels are compiled before a step needs them: what is asked for ahead is what steps launch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint import loader
from nextn.checkpoint.loader import LoadedModel
from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.execution import shard
from nextn.execution.compiling import prompts_of_every_kind
from nextn.execution.decode_runner import padded_sizes
from nextn.execution.memory import make_kv_cache
from nextn.kernels import gpu
from nextn.kernels.paged_attention import paged_attention
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Scheduler, SchedulerConfig
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.decode_step import DecodeRows, DecodeStep
from nextn.speculative.grammar import Grammars
from nextn.speculative.proposer import NextNProposer
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import request
from tests.headers import published_config
from tests.without_cuda import AllZero, WithoutCuda

CUDA = torch.device("cuda")
MAX_SEQS, MAX_DRAFTS, CHUNK, CONTEXT, NUM_PAGES = 6, 5, 4096, 131072, 999

Asked = set[tuple[object, ...]]


def _specialised(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[object, ...]:
    """What Triton compiles a kernel for: of a tensor its type and alignment, of an integer whether it is 1, or a
    multiple of 16, unless the kernel says that it varies."""
    varying = kernel.kwargs.get("do_not_specialize", ())
    found: list[object] = [kernel.__name__, tuple(sorted(constants.items()))]
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            is_aligned = value.storage_offset() * value.itemsize % 16 == 0
            found.append((name, value.dtype, is_aligned or name in varying))
        elif isinstance(value, int):
            found.append((name, name in varying or (value == 1, value % 16 == 0), value < 2**31))
        else:
            found.append((name, value if isinstance(value, tuple) else type(value)))
    return tuple(found)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """All that is launched, or compiled, while the fixture is in use."""
    pytest.importorskip("triton")
    found: Asked = set()

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found.add(_specialised(kernel, arguments, constants))

    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(gpu, "compiling_in", lambda pool: nullcontext())
    monkeypatch.setattr(gpu, "suits", lambda *tensors: all(x is None or x.is_cuda or x.is_meta for x in tensors))
    monkeypatch.setattr(gpu, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(gpu, "has_descriptors", lambda device: True)
    monkeypatch.setattr(gpu, "can_be_described", lambda x: x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0)
    monkeypatch.setattr(gpu, "described", lambda x, block: ("descriptor", x.dtype, block))
    monkeypatch.setattr(gpu, "starts_early", lambda device: True)
    monkeypatch.setattr(gpu, "prefetch_bytes", lambda weight: 0 if weight.shape[-1] * weight.itemsize % 16 else 512)
    monkeypatch.setattr(gpu, "num_processors", lambda device: 132)
    monkeypatch.setattr(gpu, "shared_memory", lambda device: 227 * 1024)
    return found


@contextmanager
def _on_a_gpu() -> Iterator[None]:
    """Tensors on a GPU are there, but for their values."""
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCuda(), torch.inference_mode():
        yield


Made = tuple[EngineConfig, LoadedModel, Callable[..., KVCache]]


@pytest.fixture(params=[("glm-4.5-air", "channel"), ("glm-4.6", "block"), ("glm-4.6", "none")], ids=str)
def made(request: pytest.FixtureRequest, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A model of published width, with few layers, and how its KV pool is made."""
    name, quant = request.param
    raw = published_config(name, quant)
    raw["first_k_dense_replace"], raw["num_hidden_layers"] = 1, 2
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = EngineConfig(model_path=str(tmp_path), load_format="dummy", max_running_requests=MAX_SEQS)
    monkeypatch.setattr(loader, "_fill", lambda *arguments, **options: None)  # there are no values to write
    with _on_a_gpu():
        loaded = loader.load_model(config, device=CUDA, dtype=torch.bfloat16, want_draft=True)

    def kv_cache_of(num_pages: int, device: torch.device = CUDA, tp_size: int = 1) -> KVCache:
        return make_kv_cache(
            loaded.model_config,
            num_layers=loaded.model_config.num_hidden_layers + 1,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=torch.bfloat16,
            device=device,
            tp_size=tp_size,
        )

    return config, loaded, kv_cache_of


def test_all_that_steps_launch_is_compiled_ahead(made: Made, asked: Asked) -> None:
    config, loaded, kv_cache_of = made
    shard._compile_ahead(*made, CHUNK, CONTEXT, MAX_DRAFTS, SINGLE)
    ahead = set(asked)
    assert loaded.draft is not None
    for run in (_run_decode_steps, _run_prompts):
        asked.clear()
        with _on_a_gpu():
            kv_cache = kv_cache_of(NUM_PAGES)
            run(config, loaded.target, NextNProposer(loaded.draft, kv_cache), kv_cache)
        assert len(asked) > 30
        assert asked <= ahead, sorted(map(str, asked - ahead))


@pytest.mark.parametrize("max_seqs", [64, 256])
def test_attention_is_compiled_ahead_for_every_number_of_sequences(asked: Asked, max_seqs: int) -> None:
    """Of GLM-4.5-Air's shape. Whatever a step of many short and long sequences asks for was asked for before."""
    draw = random.Random(3)
    weight = torch.empty(4096, 12288, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(1, 16, 8, 128, dtype=torch.bfloat16, device="meta")

    def attend(spans: list[tuple[int, int]]) -> None:
        pages = [range(-(-(start + length) // 16)) for start, length in spans]
        layout = make_extend_batch(spans, pages, 16, weight.device).layout
        q = torch.empty(sum(length for _, length in spans), 96, 128, dtype=torch.bfloat16, device="meta")
        paged_attention(q, kv, kv, layout, 0.1, next_weight=weight)

    def some_batch() -> list[tuple[int, int]]:
        num_seqs, longest = int(max_seqs ** draw.random()), 2 ** draw.uniform(0, 12)
        lengths = [int(max(longest ** draw.random(), 1)) for _ in range(num_seqs)]
        fitting = [length for i, length in enumerate(lengths) if sum(lengths[: i + 1]) <= CHUNK + max_seqs]
        return [(draw.choice([0, draw.randrange(2 * CHUNK)]), length) for length in fitting]

    for spans in prompts_of_every_kind(CHUNK, max_seqs):
        attend(spans)
    ahead = set(asked)
    for _ in range(1500):
        attend(some_batch())
    assert asked == ahead, sorted(map(str, asked - ahead))


LAYER = [
    *("_norm_rows", "_matmul", "_rope_and_cache", "attend_tiles", "merge_parts", "_matmul"),
    *("_norm_rows", "_route", "_align_expert", "_expert_matmul", "_quantize_rows", "_expert_matmul"),
]
"""What several sequences' new tokens take in a mixture's layer. A launch takes a few per cent of one of these."""


def test_a_layer_is_few_launches(made: Made, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    config, loaded, kv_cache_of = made
    launched: list[str] = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, grid, *others, **options: launched.append(kernel.__name__))
    with _on_a_gpu():
        batch = make_extend_batch([(9000, 1)] * 4, [range(600)] * 4, config.page_size, CUDA)
        loaded.target.forward(torch.zeros(4, dtype=torch.int64, device=CUDA), batch, kv_cache_of(NUM_PAGES))
    is_quantized = loaded.report.target[0].scheme != "unquantized"
    of_layer = (
        LAYER if is_quantized else [name for name in LAYER if name not in ("_matmul", "_quantize_rows")]
    )  # cuBLAS
    assert launched[-len(of_layer) - 1 :] == [*of_layer, "_norm_rows"]


def test_one_rank_compiles_for_all_and_waits_for_none(made: Made, asked: Asked) -> None:
    """There are no others here."""
    config, loaded, kv_cache_of = made
    kv_cache_of = partial(kv_cache_of, tp_size=4)
    by_rank: list[Asked] = []
    for rank in (0, 1, 3):
        asked.clear()
        shard._compile_ahead(config, loaded, kv_cache_of, CHUNK, CONTEXT, MAX_DRAFTS, TensorParallel(rank, 4, 4))
        by_rank.append(set(asked))
    assert len(by_rank[0]) > 60
    assert by_rank[1] | by_rank[2] <= by_rank[0]


def _run_decode_steps(
    config: EngineConfig, target: Glm4MoeForCausalLM, proposer: NextNProposer, kv_cache: KVCache
) -> None:
    """Of every kind that is recorded. The pool is smaller than the context, which is not known ahead."""
    state = DecodeState(
        num_slots=MAX_SEQS,
        vocab_size=target.config.vocab_size,
        context_length=NUM_PAGES * config.page_size,
        max_drafts=MAX_DRAFTS,
        page_size=config.page_size,
        scratch_page=NUM_PAGES,
        device=CUDA,
    )
    step = DecodeStep(target, proposer, kv_cache, state)
    for size in padded_sizes(MAX_SEQS):
        for num_drafts in range(MAX_DRAFTS + 1):
            for is_greedy in (True, False):
                rows = DecodeRows(*torch.zeros(3, size, dtype=torch.int64, device=CUDA).unbind())
                step.run(rows, num_drafts, is_greedy=is_greedy)


def _run_prompts(config: EngineConfig, target: Glm4MoeForCausalLM, proposer: NextNProposer, kv_cache: KVCache) -> None:
    """Of any length, alone and together, cut into chunks, beside others that decode, greedy and sampled."""
    cycle = SpeculativeCycle(target, proposer, kv_cache, page_size=config.page_size, grammars=Grammars(None, 0))
    scheduler = Scheduler(
        SchedulerConfig(
            max_running=MAX_SEQS,
            max_queued=99,
            max_prefill_tokens=CHUNK,
            context_length=NUM_PAGES * config.page_size,
            num_drafts=0,
            by_priority=False,
            eos_token_ids=(1,),
        ),
        KVPages(NUM_PAGES, config.page_size),
    )
    draw = random.Random(7)
    with AllZero():
        for i in range(60):
            prompt = [5 + j % 9 for j in range(int(2 ** draw.uniform(0, 13)))]
            sampling = {"temperature": float(draw.randrange(2)), "ignore_eos": True}
            scheduler.add(request(str(i), prompt, max_new_tokens=draw.randrange(1, 12), **sampling))
            while scheduler.has_work and (i == 59 or draw.random() < 0.6):
                extends = scheduler.schedule()
                for extend, decision in zip(extends, cycle.run(extends), strict=True):
                    scheduler.commit(extend, decision)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_are_compiled_at_once_and_kept(arch: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """For cards that are not there, one without FP8 units. In processes of their own: here kernels are interpreted."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.execution.compile_checkpoint", str(tiny_checkpoint), str(arch)]
    ran = [
        subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
            cwd=Path(__file__).parents[2],
            check=False,
        )
        for _ in range(2)
    ]
    assert all(one.returncode == 0 for one in ran), ran[0].stderr + ran[1].stderr
    first, again = (json.loads(one.stdout) for one in ran)
    assert first["compiled"] == len(list(tmp_path.rglob("*.cubin"))) > 30
    assert again == {"compiled": 0, "found": first["compiled"] + first["found"]}
