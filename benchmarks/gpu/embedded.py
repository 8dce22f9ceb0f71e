"""The embedded model on the GPU against the CPU: the same answers, up to ties, and drafts as good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nextn import demo
from nextn.config.engine_config import EngineConfig
from nextn.execution.engine import Engine
from nextn.kernels import native
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.text.tokenizer import Tokenizer

from benchmarks.common import prompts
from benchmarks.gpu.place import Place
from benchmarks.gpu.row import Goal, Outcome, Row

NUM_DRAFTS = 3
NUM_TOP = 20
TIE = 1.0
"""Nats. A card multiplies activations in FP8 too; here that moves the lead of the likeliest token over the next by 0.09
in the median and by 1.4 at the 99th percentile."""
ACCEPT_GOAL = Goal(at_least=0.95, at_most=1.05)


def measure(place: Place) -> Iterator[Outcome]:
    if not place.is_rehearsal and native.cpu is None:
        raise RuntimeError("the CPU's side needs nextn's compiled kernels; install it with a C compiler")
    num_prompts, num_tokens = (32, 96) if not place.is_rehearsal else (2, 3)
    folder = str(demo.checkpoint_dir())
    asked = prompts(Tokenizer(folder), num_prompts)
    on_cpu = make_engine(folder, device="cpu")
    expected = answers(on_cpu, asked, num_tokens)
    with place.on_device():
        dtype = "float32" if place.way == "torch" else "bfloat16"
        options = {"device": place.device.type, "dtype": dtype, "decode_on_device": True}
        on_gpu = make_engine(folder, **options)
        got = answers(on_gpu, asked, num_tokens)
        accept_length = on_gpu.stats().accept_length or 1.0
    of_cpu = on_cpu.stats().accept_length or 1.0
    yield Row(
        f"embedded model, accept length of {NUM_DRAFTS} drafts",
        ACCEPT_GOAL,
        accept_length,
        "tokens",
        accept_length / of_cpu,
        of_cpu,
        "CPU",
    )
    gaps = [
        gap_where_they_part(on_cpu, prompt, mine, theirs)
        for prompt, mine, theirs in zip(asked, expected, got, strict=True)
        if mine != theirs
    ]
    same = len(asked) - len(gaps)
    yield Row(
        f"embedded model, greedy answers: {same} of {len(asked)} are the CPU's, token for token",
        Goal(at_most=TIE),
        max(gaps, default=0.0),
        "nats",
        max(gaps, default=0.0),
        note="how much likelier the CPU holds its own token where an answer first parts, at most",
    )


def make_engine(folder: str, **options: Any) -> Engine:
    return Engine(
        EngineConfig(
            model_path=folder,
            num_draft_steps=NUM_DRAFTS,
            max_running_requests=8,
            max_total_tokens=8 * 512,
            canary="off",
            **options,
        )
    )


def answers(engine: Engine, asked: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(asked):
        found[str(i)] = []
        refusal = engine.add(_request(str(i), prompt, num_tokens))
        assert refusal is None, refusal
    while engine.has_work:
        for output in engine.step():
            found[output.rid] += output.token_ids
    return list(found.values())


def gap_where_they_part(engine: Engine, prompt: list[int], mine: list[int], theirs: list[int]) -> float:
    """How much likelier, in nats, the engine holds its own token than the other at the first that differs."""
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if at is None:
        raise AssertionError("an answer ends where another goes on with the same tokens")
    refusal = engine.add(_request("gap", prompt + mine[:at], 1, NUM_TOP))
    assert refusal is None, refusal
    top: dict[int, float] = {}
    while engine.has_work:
        for output in engine.step():
            if output.logprobs:
                top = dict(output.logprobs[0].top)
    least = min(top.values())
    return top.get(mine[at], least) - top.get(theirs[at], least)


def _request(rid: str, prompt: list[int], num_tokens: int, num_top: int | None = None) -> AddRequest:
    sampling = TokenSampling(max_new_tokens=num_tokens, seed=0, temperature=0.0)
    return AddRequest(rid=rid, input_ids=prompt, sampling=sampling, num_top_logprobs=num_top)
