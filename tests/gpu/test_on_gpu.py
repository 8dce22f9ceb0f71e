"""The model and the engine on a GPU against the CPU; and, so that the checks are tried, the same without one."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nextn.kernels import gpu

from tests.checkpoints import tiny_config
from tests.conftest import EngineFactory
from tests.gpu.checks import (
    answers,
    check_adds_up,
    check_logits,
    check_new_requests_are_seen,
    check_same_answers,
    logged_plan,
    logits_of,
    random_pair,
    some_plan,
)
from tests.headers import official_ignores, published_config

FP8_TOLERANCE = 0.15
"""Activations are rounded to FP8 in front of each product, by 0.026 of their length; a layer does so four times."""
BF16_TOLERANCE = 0.02
"""bfloat16 rounds by 0.002 of the length, some ten times per layer."""


def config_of(quant: str, **shape: Any) -> dict[str, Any]:
    """Every token takes every expert, so that a tie in the router cannot choose others than on the CPU."""
    config = published_config("glm-4.5-air", "channel") | shape
    config |= {"num_experts_per_tok": config["n_routed_experts"], "num_nextn_predict_layers": 0}
    if quant == "none":
        del config["quantization_config"]
    else:
        config["quantization_config"] = {**config["quantization_config"], "ignore": official_ignores(config)}
    return config


@pytest.fixture
def all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("quant", "tolerance"), [("channel", FP8_TOLERANCE), ("none", BF16_TOLERANCE)])
def test_a_small_model_gives_the_cpus_logits(quant: str, tolerance: float, device: torch.device) -> None:
    shape = {
        k: v
        for k, v in tiny_config(n_routed_experts=4, num_hidden_layers=2).items()
        if k not in ("num_nextn_predict_layers",)
    }
    check_logits(config_of(quant, **shape), device, tolerance)


@pytest.mark.parametrize(("quant", "tolerance"), [("channel", FP8_TOLERANCE), ("none", BF16_TOLERANCE)])
def test_a_model_as_wide_as_air_gives_the_cpus_logits(
    quant: str, tolerance: float, cuda: torch.device, all_cores: None
) -> None:
    shape = {"num_hidden_layers": 4, "n_routed_experts": 8, "vocab_size": 8192, "intermediate_size": 4096}
    check_logits(config_of(quant, **shape), cuda, tolerance)


def test_recordings_and_overlap_change_no_token_where_results_do_not_depend_on_the_batch(
    make_engine: EngineFactory, cuda: torch.device
) -> None:
    ways = [
        {"enable_cuda_graph": graph, "enable_overlap": overlap, "num_draft_steps": drafts}
        for drafts, graph, overlap in itertools.product((0, 3), (False, True), (False, True))
    ]
    check_same_answers(make_engine, [{"device": "cuda", "batch_invariant": True, **way} for way in ways])


def test_kernels_that_start_early_give_the_same_bits(
    make_engine: EngineFactory, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that read what its predecessor had not written yet would differ, now and then."""
    ours, _ = random_pair(config_of("channel", num_hidden_layers=4, n_routed_experts=8, vocab_size=8192), cuda)
    early = [logits_of(ours, cuda) for _ in range(5)]
    answered = [answers(make_engine(device="cuda", num_draft_steps=k), seed=k) for k in (0, 3) for _ in range(2)]
    monkeypatch.setattr(gpu, "starts_early", lambda device: False)
    in_turn = logits_of(ours, cuda)
    assert all(torch.equal(one, in_turn) for one in early)
    assert answered == [
        answers(make_engine(device="cuda", num_draft_steps=k), seed=k) for k in (0, 3) for _ in range(2)
    ]


def test_overlap_changes_no_token_on_a_cpu_either(make_engine: EngineFactory) -> None:
    ways = [{"enable_overlap": overlap, "num_draft_steps": k} for k in (0, 3) for overlap in (False, True)]
    check_same_answers(
        make_engine, [{"device": "cpu"}, *({"device": "cpu", "decode_on_device": True, **w} for w in ways)]
    )


def test_a_replayed_step_sees_new_requests(
    make_engine: EngineFactory, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    common = {"device": "cuda", "batch_invariant": True}
    check_new_requests_are_seen(make_engine, common, {**common, "enable_cuda_graph": False, "enable_overlap": False})
    assert len(replays) > 20


def test_a_launched_step_sees_new_requests_on_a_cpu_too(make_engine: EngineFactory) -> None:
    plain = {"device": "cpu"}
    check_new_requests_are_seen(make_engine, {**plain, "decode_on_device": True}, plain)


def test_the_memory_plan_of_a_loaded_engine_adds_up(
    make_engine: EngineFactory, cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nextn"):
        engine = make_engine(device="cuda", mem_fraction_static=0.5, max_total_tokens=4096)
    check_adds_up(logged_plan(caplog))
    answered = torch.cuda.max_memory_allocated(cuda)
    assert answered <= 0.5 * torch.cuda.get_device_properties(cuda).total_memory
    assert engine.stats().num_pages * engine.config.page_size == 4096


def test_a_memory_plan_adds_up() -> None:
    check_adds_up(some_plan().as_table())
