"""Canary and monitor in the engine, on the embedded checkpoint: as it is, and spoilt in ways that load in silence."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable

import pytest
import torch
from nextn import LLM, SamplingParams
from nextn.config.engine_config import EngineConfig
from nextn.demo import checkpoint_dir
from nextn.errors import CheckpointError
from nextn.execution.engine import Engine
from nextn.speculative.canary import MAX_NEW_TOKENS, canary_prompts
from nextn.speculative.monitor import ALARM_GENERATIONS, GENERATION
from safetensors.torch import load_file, save_file

from tests.checkpoints import State
from tests.conftest import EngineFactory, request, run_all

SMALL = {"max_total_tokens": 8192, "context_length": 1024}
PREFIX = "model.layers.5."
GREEDY = SamplingParams(temperature=0, max_new_tokens=48)


def swap_concat_halves(state: State) -> None:
    weight = state[f"{PREFIX}eh_proj.weight"]
    state[f"{PREFIX}eh_proj.weight"] = weight.roll(weight.shape[1] // 2, 1)


def random_head(state: State) -> None:
    target = load_file(checkpoint_dir() / "model.safetensors")
    like = target["lm_head.weight"].float()
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)) * like.std()
    state[f"{PREFIX}shared_head.head.weight"] = noise.bfloat16()


def shift_norms(state: State) -> None:
    for name in [name for name in state if "norm" in name]:
        state[name] = state[name] - 0.9


MUTANTS: dict[str, Callable[[State], None]] = {
    "swapped": swap_concat_halves,
    "random": random_head,
    "shifted": shift_norms,
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The path of a mutant of the embedded checkpoint."""

    def make(name: str) -> str:
        folder = tmp_path_factory.mktemp("mutants") / name
        shutil.copytree(checkpoint_dir(), folder)
        state = load_file(folder / "mtp.safetensors")
        MUTANTS[name](state)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "mtp.safetensors")
        return str(folder)

    return make


@pytest.mark.parametrize("num_draft_steps", [None, 1, 3, 5])
def test_the_embedded_model_is_healthy(num_draft_steps: int | None) -> None:
    engine = Engine(
        EngineConfig(model_path=str(checkpoint_dir()), num_draft_steps=num_draft_steps, canary="fail", **SMALL)
    )
    canary = engine.draft_health().canary
    assert canary.verdict == "healthy", canary.message
    assert canary.acceptance is not None
    assert canary.acceptance.rates[0] > 0.8
    prompts = canary_prompts(checkpoint_dir())
    assert prompts
    started = time.monotonic()
    run_all(engine, [request(str(i), prompt, MAX_NEW_TOKENS) for i, prompt in enumerate(prompts)])
    assert canary.seconds < 5 * (time.monotonic() - started), "it takes what its sentences take"


def test_the_canary_leaves_no_trace() -> None:
    engine = Engine(EngineConfig(model_path=str(checkpoint_dir()), **SMALL))
    stats = engine.stats()
    assert stats.num_free_pages == stats.num_pages
    assert stats.generation_tokens == stats.num_steps == stats.num_verify_passes == stats.num_preemptions == 0
    assert engine.draft_health().windows["all"].num_chains == 0
    assert not engine.has_work
    engine.scheduler.check()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_sick_draft_is_called_so(spoilt: Callable[[str], str], name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = spoilt(name)
    health = Engine(EngineConfig(model_path=path, **SMALL)).draft_health()
    assert health.canary.verdict == "sick"
    assert health.complaint == health.canary.message
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [health.canary.message]
    with pytest.raises(CheckpointError, match=r"draft is sick: position 1 accepted .* Likely: .*-canary warn"):
        Engine(EngineConfig(model_path=path, canary="fail", **SMALL))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"canary": "off"}, "--speculative-canary off"),
        ({"load_format": "dummy", "canary": "fail"}, "dummy weights"),
        ({"num_draft_steps": 0, "canary": "fail"}, "nothing drafts"),
        ({"context_length": 32}, "of context"),
        ({"tokenizer_path": "/nonexistent"}, "no tokenizer.json"),
    ],
)
def test_where_the_canary_cannot_sing_it_says_why(options: dict[str, object], reason: str) -> None:
    values = {"model_path": str(checkpoint_dir()), **SMALL, **options}
    health = Engine(EngineConfig(**values)).draft_health()  # type: ignore[arg-type]
    assert health.canary.verdict == "skipped"
    assert reason in health.canary.message
    assert health.complaint is None
    assert (health.state == "off") == ("num_draft_steps" in options)


def test_a_checkpoint_without_tokenizer_is_served(make_engine: EngineFactory) -> None:
    assert "no tokenizer.json" in make_engine(canary="fail").draft_health().canary.message


def test_a_collapse_while_serving_is_said_within_a_window(caplog: pytest.LogCaptureFixture) -> None:
    """The draft's weights are overwritten in memory between two requests, as a stray write would."""
    llm = LLM(speculative_num_steps=3, **SMALL)
    questions = ("What is the capital of France?", "What is 7 times 8?", "Hello! Who are you?", "Tell me a story.")
    prompts = [f"[gMASK]<sop><|user|>\n{question}<|assistant|>" for question in questions]
    before = llm.generate(prompts, GREEDY)
    while llm.engine.draft_health().state == "unknown":
        llm.generate(prompts, GREEDY)
    draft = llm.engine._loaded.draft
    assert draft is not None
    draft.norm.weight.zero_()
    num_chains = llm.stats.num_verify_passes
    while llm.engine.draft_health().state == "healthy":
        assert llm.stats.num_verify_passes - num_chains < (ALARM_GENERATIONS + 1) * GENERATION + 64
        after = llm.generate(prompts[:2], GREEDY)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line.startswith("draft collapsed")
    assert [one.output_ids for one in after] == [one.output_ids for one in before[:2]]
    assert llm.engine.draft_health().complaint == llm.engine.info()["draft_health"]["complaint"]
