"""Whole steps of the engine, in which no kernel loads early what the launch before it stores.

That kernels read early at all, and which, is seen in compiled code (test_compile_ahead.py); here it is seen what they
read, in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from nextn import kernels
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import TensorParallel
from nextn.execution import rehearsal
from nextn.execution.decode_runner import DecodeRunner
from nextn.execution.engine import Engine
from nextn.execution.memory import make_kv_cache
from nextn.kernels import fused_moe, gpu, paged_attention_triton
from nextn.kernels.attention_tiles import SHARE_ROWS
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.fused_moe import StackedExperts, expert_terms
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.matmul_config import SMALL_M
from nextn.kernels.paged_attention import AttentionLayout, paged_attention
from nextn.kernels.rope_and_cache import Rotation
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.layers.moe import MoE
from nextn.protocol.ranks import DecodeBatch, NewSequence, SlotPatch
from nextn.protocol.sampling import TokenSampling
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.decode_step import DecodeStep
from nextn.speculative.proposer import NextNProposer

from tests import checkpoints
from tests.checkpoints import Quant, tiny_config, write_checkpoint
from tests.conftest import request, run_all
from tests.kernels.test_compile_ahead import READ_EARLY

if TYPE_CHECKING:
    from tests.kernels.launch_watch import LaunchWatch

CPU = torch.device("cpu")
PAGE_SIZE, NUM_PAGES, NUM_SLOTS, CONTEXT, MAX_DRAFTS = 16, 66, 2, 512, 3
LENGTHS = [300, 1]
"""Of the slots' sequences; the first one's keys are divided among several programs."""

KINDS: dict[Quant, dict[str, Any]] = {
    "channel": {"use_qk_norm": True},
    "block": {"use_qk_norm": False},
    "none": {"use_qk_norm": True, "n_shared_experts": 2},  # computed apart from the routed ones
}
KV_TYPES: dict[Quant, torch.dtype] = {"channel": torch.float8_e4m3fn, "block": torch.bfloat16, "none": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Quant, Path]:
    """One dense layer, one mixture, and a NextN layer. Blocks are as wide as the kernels for GPUs take them."""
    found: dict[Quant, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "BLOCK", (32, 32))
        for quant, options in KINDS.items():
            config = tiny_config(
                vocab_size=40,
                num_hidden_layers=2,
                num_key_value_heads=1,
                max_position_embeddings=600,
                moe_intermediate_size=32,
                intermediate_size=96,
                n_routed_experts=4,
                **options,
            )
            found[quant] = write_checkpoint(tmp_path_factory.mktemp(quant), config, quant=quant)
    return found


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> LaunchWatch:
    """Launches in Triton's interpreter, watched; of torch's operations, those while it is entered."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("beside a GPU kernels are compiled, and the interpreter does not see what they touch")
    from tests.interpreter import stand_in_for_a_gpu
    from tests.kernels.launch_watch import watch_launches

    stand_in_for_a_gpu(monkeypatch)
    return watch_launches(monkeypatch)


def _load(
    folder: Path, kv_dtype: torch.dtype = torch.bfloat16, *, batch_invariant: bool = False
) -> tuple[LoadedModel, KVCache]:
    config = EngineConfig(model_path=str(folder), batch_invariant=batch_invariant)
    loaded = load_model(config, device=CPU, dtype=torch.bfloat16, want_draft=True)
    return loaded, make_kv_cache(
        loaded.model_config, num_layers=3, num_pages=NUM_PAGES + 1, page_size=PAGE_SIZE, dtype=kv_dtype, device=CPU
    )


def _runner(loaded: LoadedModel, kv_cache: KVCache) -> DecodeRunner:
    assert loaded.draft is not None
    state = DecodeState(NUM_SLOTS, 40, CONTEXT, MAX_DRAFTS, PAGE_SIZE, NUM_PAGES, CPU)
    return DecodeRunner(DecodeStep(loaded.target, NextNProposer(loaded.draft, kv_cache), kv_cache, state), state)


def _patches(**sampling: Any) -> list[SlotPatch]:
    """Every slot gets a new sequence, of LENGTHS."""
    found = []
    for slot, length in enumerate(LENGTHS):
        new = NewSequence(TokenSampling(max_new_tokens=99, seed=slot, **sampling), length, length + 99, [1])
        pages = list(range(slot * NUM_PAGES // NUM_SLOTS, (slot + 1) * NUM_PAGES // NUM_SLOTS))
        found.append(SlotPatch(slot, 0, [(3 * i + slot) % 40 for i in range(length)], 0, pages, new))
    return found


SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "presence_penalty": 0.5, "min_new_tokens": 3}


def _decode(runner: DecodeRunner) -> None:
    """Steps without and with drafts, greedy and sampled, of several sequences and of one."""
    for is_greedy in (True, False):
        patches = _patches(**({"temperature": 0.0} if is_greedy else SAMPLED))
        for num_drafts in (0, MAX_DRAFTS):
            runner.launch(DecodeBatch([0, 1], [num_drafts] * 2, num_drafts, is_greedy, patches)).read()
            patches = [SlotPatch(1, 2, [7, 7], 0, [])]  # as if another kind of step had decided tokens meanwhile
    runner.launch(DecodeBatch([1], [0], 0, True, [])).read()


def _kernels() -> set[str]:
    """All that are launched; others are parts of these."""
    names = [one.name for one in pkgutil.iter_modules(kernels.__path__) if not one.name.startswith("_")]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    functions = [one for module in modules for one in vars(module).values() if "EARLY" in getattr(one, "arg_names", ())]
    return {one.__name__ for one in functions if one is not gpu.wait_for_predecessor}


@pytest.mark.parametrize("quant", KINDS)
def test_decode_steps_load_early_only_what_is_old(folders: dict[Quant, Path], quant: Quant, watch: LaunchWatch) -> None:
    runner = _runner(*_load(folders[quant], KV_TYPES[quant]))
    with watch:
        _decode(runner)
    assert not watch.faults
    assert set(+watch.early) == READ_EARLY
    assert _kernels() - set(watch.launched) == OF_SEVERAL_RANKS | ({"_quantize_rows"} if quant == "none" else set())


OF_SEVERAL_RANKS = {"_combine"}
"""One rank alone has its norms sum up."""


def _decode_as_one_of_several(runner: DecodeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks add up, gather and broadcast where one rank's step has nothing to do."""
    for module in runner._step._target.modules():
        if isinstance(module, MoE):
            monkeypatch.setattr(module, "tp", TensorParallel(size=2))
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(TensorParallel, name, lambda self, x: x.mul_(1))
    monkeypatch.setattr(TensorParallel, "gather_columns", lambda self, x, num_columns: x.clone())
    runner.launch(DecodeBatch([0, 1], [1] * 2, 1, False, _patches(**SAMPLED))).read()


def test_collectives_between_launches_change_nothing(
    folders: dict[Quant, Path], watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _runner(*_load(folders["channel"]))
    with watch:
        _decode_as_one_of_several(runner, monkeypatch)
    assert not watch.faults
    assert watch.early["merge_parts"] > 0
    assert set(watch.launched) > OF_SEVERAL_RANKS


@torch.inference_mode()
def _extend(loaded: LoadedModel, kv_cache: KVCache) -> None:
    """Long and short sequences in one forward, over prefixes and without; then the draft layer's entries of them."""
    spans, tables = [(0, 34), (290, 2), (40, 17)], [[*range(3)], [*range(5, 24)], [*range(24, 28)]]
    ids = torch.arange(53) * 7 % 40
    batch = make_extend_batch(spans, tables, PAGE_SIZE, CPU)
    hidden = loaded.target.forward(ids, batch, kv_cache)
    loaded.target.compute_logits(hidden)
    draft = loaded.draft
    assert draft is not None
    draft.write_kv(ids.roll(-1), hidden, batch.positions, batch.slot_mapping, kv_cache)
    draft.forward(ids.roll(-1), hidden, make_extend_batch(spans, tables, PAGE_SIZE, CPU, first_key=1), kv_cache)


@pytest.mark.parametrize(("quant", "batch_invariant"), [("channel", False), ("block", True)])
def test_prompts_load_early_only_what_is_old(
    folders: dict[Quant, Path], quant: Quant, batch_invariant: bool, watch: LaunchWatch
) -> None:
    loaded, kv_cache = _load(folders[quant], KV_TYPES[quant], batch_invariant=batch_invariant)
    with watch:
        _extend(loaded, kv_cache)
    assert not watch.faults
    assert {"_norm_rows", "_rope_and_cache", "attend_tiles"} <= set(+watch.early)
    assert watch.launched["attend_tiles"] == (3 if batch_invariant else 6), "long sequences apart from short ones"


def test_an_engine_loads_early_only_what_is_old(
    folders: dict[Quant, Path], watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a prompt beside steps that decode, and draft entries made later."""
    monkeypatch.setattr(rehearsal, "WARM_UP_TOKENS", 1)
    engine = Engine(
        EngineConfig(
            model_path=str(folders["block"]),
            dtype="bfloat16",
            decode_on_device=True,
            max_running_requests=3,
            canary="off",
            page_size=4,
            num_draft_steps=2,
            chunked_prefill_size=18,
        )
    )
    requests = [
        request("short", [3, 9, 1], max_new_tokens=6, num_top_logprobs=1),  # drafted for step by step
        request("long", [i % 40 for i in range(30)], max_new_tokens=2),
        request("sampled", [30, 2], max_new_tokens=4, temperature=0.9, top_p=0.9, repetition_penalty=1.1),
    ]
    with watch:
        run_all(engine, requests)
    assert not watch.faults
    assert set(+watch.early) == READ_EARLY


@pytest.mark.parametrize(("dtype", "num_shares"), [(torch.bfloat16, 4), (FP8, 2)])
def test_programs_without_keys_ask_for_the_beginning_of_the_next_weight(
    dtype: torch.dtype, num_shares: int, watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte once; and what attention returns is the same."""
    asked: list[np.ndarray] = []
    note = watch.prefetch
    monkeypatch.setattr(watch, "prefetch", lambda places: (asked.append(places), note(places)))
    share = SHARE_ROWS * gpu.PREFETCH_BYTES
    weight = torch.zeros(num_shares * share // (96 * dtype.itemsize) + 3, 96, dtype=dtype)
    cache = torch.randn(40, PAGE_SIZE, 2, 16).bfloat16()

    def attend(lengths: list[int], weight: torch.Tensor | None) -> torch.Tensor:
        """One more token each, over page tables with room for 640."""
        pages = torch.arange(40).expand(len(lengths), 40)
        ends = torch.arange(len(lengths) + 1)
        layout = AttentionLayout(torch.tensor(lengths), ends, pages, PAGE_SIZE, 0, 1)
        torch.manual_seed(0)
        q = torch.randn(len(lengths), 6, 16).bfloat16()
        with watch:
            return paged_attention(q, cache, cache, layout, 0.25, next_weight=weight)

    assert torch.equal(attend([3], None), attend([3], weight))
    places = np.concatenate(asked)
    bytes_asked = np.concatenate([np.arange(first, end) for first, end in places]) - weight.data_ptr()
    assert np.array_equal(np.sort(bytes_asked), np.arange(num_shares * share))
    asked.clear()
    attend([3], weight.repeat(6, 1))  # there are programs for this alone
    of_those_with_keys = cache.shape[2]
    assert _bytes_of(asked) == (6 * num_shares - of_those_with_keys) * share
    asked.clear()
    monkeypatch.setattr(paged_attention_triton, "AHEAD_BYTES", share)
    attend([3], weight)
    assert _bytes_of(asked) == share, "no more than that"
    asked.clear()
    attend([639] * 8, weight)  # as many programs as have keys
    attend([3] * (SMALL_M + 1), weight)
    assert not asked
    assert not watch.faults


def test_one_tokens_shared_expert_is_asked_for_while_the_others_are_chosen(
    watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its first matrix, and nothing of the routed ones."""
    asked: list[np.ndarray] = []
    note = watch.prefetch
    monkeypatch.setattr(watch, "prefetch", lambda places: (asked.append(places), note(places)))
    monkeypatch.setattr(fused_moe, "expert_matmul", partial(_first_matrix_alone, fused_moe.expert_matmul))
    w13 = torch.randn(5, 2 * 40, 48).to(FP8)
    scales = torch.ones(5, 80, 1), torch.ones(5, 48, 1)
    experts = StackedExperts(w13, scales[0], torch.randn(5, 48, 40).to(FP8), scales[1], None, 4, True)
    ids, weights = torch.tensor([[2, 0]]), torch.rand(1, 2)
    with watch:
        expert_terms(torch.randn(1, 48).bfloat16(), ids, weights, experts)
    places = np.concatenate(asked) - w13.data_ptr()
    found = np.unique(np.concatenate([np.arange(first, end) for first, end in places]))
    assert np.array_equal(found, np.arange(4 * 80 * 48, 5 * 80 * 48))
    asked.clear()
    with watch:  # of several tokens, nobody knows yet which blocks are the shared expert's
        expert_terms(torch.randn(2, 48).bfloat16(), ids.expand(2, 2), weights.expand(2, 2), experts)
    assert not asked
    assert not watch.faults


def _first_matrix_alone(multiply: Any, *arguments: Any, swiglu: bool, **options: Any) -> torch.Tensor:
    return multiply(*arguments, swiglu=swiglu, **options) if swiglu else torch.zeros(6, 48, dtype=torch.bfloat16)


def _bytes_of(asked: list[np.ndarray]) -> int:
    return sum(int((places[:, 1] - places[:, 0]).sum()) for places in asked)


# What breaks the rule is found.


@jit
def _add_early(x, out, n, WHEN: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """x + 1. WHEN: 0 for all of it after waiting, 1 for the load before, 2 for a store before too; 3 for no waiting
    in the second program.
    """
    places = tl.program_id(0) * 8 + tl.arange(0, 8)
    if WHEN == 1 or WHEN == 2:
        values = tl.load(x + places, mask=places < n, other=0.0)
    if WHEN == 2:
        tl.store(out + places, values, mask=places < n)
    if WHEN != 3 or tl.program_id(0) == 0:
        wait_for_predecessor(EARLY)
    if WHEN == 0 or WHEN == 3:
        values = tl.load(x + places, mask=places < n, other=0.0)
    tl.store(out + places, values + 1, mask=places < n)


def _add(x: torch.Tensor, out: torch.Tensor, when: int) -> None:
    gpu.launch(_add_early, (2,), x, out, x.numel(), WHEN=when)


def test_loading_early_what_the_launch_before_stores_is_a_fault(watch: LaunchWatch) -> None:
    x, y, z = torch.zeros(3, 13).unbind()
    with watch:
        _add(x, y, 0)
        _add(y, z, 0)
        assert not watch.faults
        _add(z, x, 1)
    assert watch.faults == ["_add_early loads what _add_early stores, before it waits"]
    assert z.tolist() == [2.0] * 13


def test_loading_early_what_an_older_launch_stores_is_none(watch: LaunchWatch) -> None:
    x, y, z = torch.zeros(3, 13).unbind()
    with watch:
        _add(x, y, 0)
        _add(x, z, 0)
        _add(y, x, 1)  # beside z, and where x was only read
    assert not watch.faults
    assert watch.early == {"_add_early": 1}


def test_loading_early_what_torch_just_stored_is_a_fault(watch: LaunchWatch) -> None:
    x, y, z = torch.zeros(3, 13).unbind()
    with watch:
        _add(x, y, 0)
        z.fill_(2)
        x.add_(1)
        _add(z, torch.empty(13), 1)
        assert watch.faults == ["_add_early loads what fill_ stores, before it waits"]
        watch.faults.clear()
        _add(y, x, 0)
        x[3:5].mul_(2)
        z.fill_(1)
        _add(x, torch.empty(13), 1)  # torch's operations in between order nothing
    assert watch.faults == [f"_add_early loads what {name} stores, before it waits" for name in ("_add_early", "mul_")]


def test_storing_early_and_not_waiting_are_faults(watch: LaunchWatch) -> None:
    x, y = torch.zeros(2, 13).unbind()
    _add(x, y, 2)
    assert watch.faults == ["_add_early stores before it waits"]
    watch.faults.clear()
    _add(x, y, 3)
    assert "_add_early has a program that never waits" in watch.faults


def test_without_waiting_every_kernel_would_show(
    folders: dict[Quant, Path], watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing that a kernel loads or stores escapes the watch, nor what torch's operations store."""
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
    runner = _runner(*_load(folders["channel"]))
    with watch:
        _decode(runner)
        _decode_as_one_of_several(runner, monkeypatch)

    def blamed(what: str) -> set[str]:
        return {fault.split()[0] for fault in watch.faults if what in fault}

    assert blamed(" stores before it waits") == blamed(" has a program that never waits") == _kernels()
    assert _kernels() - blamed(" loads what ") <= {"_rules_of_rows", "_uniform_numbers", "_mass_of_parts"}
    writers = {fault.split()[3] for fault in watch.faults if " loads what " in fault}
    assert {"index_select", "index_copy_", "masked_fill", "lift_fresh"} <= writers - _kernels()


def test_experts_that_are_not_old_would_show(
    folders: dict[Quant, Path], watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first product of a mixture follows what sorts its experts: asking for their weights early would be wrong."""
    product = fused_moe.expert_matmul

    def hasty(*arguments: Any, **options: Any) -> torch.Tensor:
        return product(*arguments, **{**options, "experts_are_old": True})

    monkeypatch.setattr(fused_moe, "expert_matmul", hasty)
    runner = _runner(*_load(folders["channel"]))
    with watch:
        runner.launch(DecodeBatch([0, 1], [0] * 2, 0, True, _patches(temperature=0.0))).read()
    assert watch.faults == ["_expert_matmul loads what _align_expert stores, before it waits"]


def test_positions_that_are_not_old_would_show(
    folders: dict[Quant, Path], watch: LaunchWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextn.layers import attention

    rotate = attention.rope_and_cache

    def late(qkv: Any, qk_norm: Any, eps: float, rotation: Rotation, slots: torch.Tensor, *caches: Any) -> torch.Tensor:
        moved = Rotation(rotation.table, rotation.positions + 0, rotation.dtype)
        return rotate(qkv, qk_norm, eps, moved, slots + 0, *caches)

    monkeypatch.setattr(attention, "rope_and_cache", late)
    runner = _runner(*_load(folders["none"]))
    with watch:
        runner.launch(DecodeBatch([1], [0], 0, True, _patches(temperature=0.0))).read()
    assert watch.faults == ["_rope_and_cache loads what add stores, before it waits"]
