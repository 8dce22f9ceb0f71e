"""A model of GLM-4.5-Air's shape with random FP8 weights: decode steps against their floor, and drafts on against off.

Random weights draft nothing that is right. So that the cost of drafts is that of a working draft, acceptance is pinned
here: of three drafts two are accepted in every step, whatever the model says.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nextn.config.engine_config import MAX_NUM_DRAFT_STEPS, EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.execution import decode_runner, shard
from nextn.execution.decode_runner import DecodeRunner, padded_sizes
from nextn.execution.engine import Engine
from nextn.kernels.verify import NO_TOKEN
from nextn.layers import moe
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.speculative.decode_step import DecodeStep

from benchmarks.gpu.floors import FP8, best_ratio, head_bytes, kv_bytes, moe_layer_bytes, step_bytes
from benchmarks.gpu.place import Place, attempt, replayed
from benchmarks.gpu.row import Goal, Outcome, Row
from benchmarks.gpu.shapes import config_of, raw_config

NAME = "glm-4.5-air"
NUM_DRAFTS, ACCEPT_LENGTH = 3, 3.0
BATCHES = (1, 4, 16, 64)
DRAFT_GOALS = {1: 1.1, 4: 1.1, 16: 1.6, 64: 2.0}
STEP_GOAL, IDLE_GOAL, RECORDING_GOAL = Goal(at_most=1.3), Goal(at_most=0.03), Goal(at_most=60)
CONTEXT, PROMPT_LEN = 512, 64
MEMORY_FRACTION, WORKING_BYTES = 0.9, 5 << 30
ROUNDS, STEPS_PER_ROUND, WARM_STEPS, IDLE_TURNS = 5, 20, 8, 3


class PinnedDecodeStep(DecodeStep):
    """Accepts ACCEPT_LENGTH - 1 drafts of every chain that is so long, after doing all that accepting takes."""

    def _accept(
        self, choice: Any, logits: torch.Tensor, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        accepted, tokens = super()._accept(choice, logits, draft_tokens, draft_probs)
        return (accepted, tokens) if draft_tokens.shape[1] == 0 else pinned(accepted, tokens, draft_tokens)


def pinned(accepted: torch.Tensor, tokens: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step decided, had it accepted ACCEPT_LENGTH - 1 drafts, or all of a shorter chain.

    accepted: [S]; tokens: [S, k + 1], the accepted drafts, the token after them, then NO_TOKEN
    drafts: [S, k], NO_TOKEN beyond a chain's end
    """
    final = tokens.gather(1, accepted[:, None])
    num = (drafts != NO_TOKEN).sum(1).clamp(max=int(ACCEPT_LENGTH) - 1)
    offsets = torch.arange(tokens.shape[1], device=tokens.device)
    chain = torch.where(offsets < num[:, None], torch.cat([drafts, final], 1), NO_TOKEN)
    return num, torch.where(offsets == num[:, None], final, chain)


@dataclass(frozen=True)
class Steps:
    """Figures of a steady state. seconds: of a step; tokens: that a step brings in all"""

    seconds: float
    tokens: float

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds


def measure(place: Place) -> Iterator[Outcome]:
    config = config_of(NAME, place, None if place.is_rehearsal else _num_layers(place))
    batches = BATCHES if not place.is_rehearsal else (1, 2) if place.way == "torch" else (1,)
    with place.on_device(), tempfile.TemporaryDirectory() as folder:
        place.check_time(20, "nothing")
        engine, recording = make_engine(place, config, Path(folder), max(batches))
        shape = f"GLM-4.5-Air, {config.num_hidden_layers} of {config_of(NAME, place).num_hidden_layers} layers"
        if not place.is_rehearsal:
            yield _recording_row(engine, recording, shape)
        plain: dict[int, Steps] = {}
        yield attempt(f"{shape}, batch 1, a step", partial(_step_row, place, engine, config, shape, plain))
        for batch in batches:
            place.check_time(6, f"batches before {batch}")
            run = partial(_drafts_row, place, engine, config, batch, shape, plain)
            yield attempt(f"{shape}, batch {batch}, drafts", run)
        for batch in sorted({1, max(batches)}):
            place.check_time(3, "the steps themselves")
            yield attempt(f"{shape}, batch {batch}, idle", partial(_idle_row, place, engine, batch, shape))
        if not place.is_rehearsal:  # last, as a profiler that was on slows what follows
            place.check_time(3, "the steps")
            yield attempt(f"{shape}, gaps", partial(_gaps_row, place, engine, shape))


def _num_layers(place: Place) -> int:
    """As many layers as the card holds."""
    whole = config_of(NAME, place)
    total = torch.cuda.get_device_properties(place.device).total_memory
    return layers_that_fit(whole, int(total * MEMORY_FRACTION), max(BATCHES) * CONTEXT)


def layers_that_fit(config: ModelConfig, num_bytes: int, num_tokens: int) -> int:
    """Layers of a model, beside embedding, head, NextN layer, KV of num_tokens tokens and room to compute."""
    layer = int(moe_layer_bytes(config, config.n_routed_experts)) + kv_bytes(config, num_tokens, 2)
    embedding_and_heads = 2 * head_bytes(config) + head_bytes(config, FP8)
    fixed = embedding_and_heads + layer + num_tokens * config.hidden_size * 2 + WORKING_BYTES
    return max(min((num_bytes - fixed) // layer, config.num_hidden_layers), config.first_k_dense_replace + 1)


def make_engine(place: Place, config: ModelConfig, folder: Path, max_batch: int) -> tuple[Engine, list[float]]:
    """The engine as it serves, with acceptance pinned and recordings of the batch sizes that are measured.

    Returns also the seconds that recording took, and took when it was done again, with all kernels made.
    """
    (folder / "config.json").write_text(json.dumps(raw_config(NAME, place, config.num_hidden_layers)))
    engine_config = EngineConfig(
        model_path=str(folder),
        load_format="dummy",
        device=place.device.type,  # type: ignore[arg-type]
        dtype="float32" if place.way == "torch" else "bfloat16",
        decode_on_device=True,
        context_length=CONTEXT,
        max_total_tokens=max_batch * CONTEXT,
        max_running_requests=max_batch,
        mem_fraction_static=MEMORY_FRACTION,
        num_draft_steps=NUM_DRAFTS,
        enable_prefix_cache=False,
        canary="off",
    )
    record, seconds = DecodeRunner.record, []

    def timed(*arguments: Any, **options: Any) -> None:
        for _ in range(2):
            arguments[0].forget()
            started = time.perf_counter()
            record(*arguments, **options)
            seconds.append(time.perf_counter() - started)

    with (
        mock.patch.object(shard, "DecodeStep", PinnedDecodeStep),
        mock.patch.object(shard, "_recorded_drafts", lambda config, most: [0, most]),
        mock.patch.object(shard, "padded_sizes", measured_sizes),
        mock.patch.object(decode_runner, "padded_sizes", measured_sizes),
        mock.patch.object(DecodeRunner, "record", timed),
    ):
        return Engine(engine_config), seconds


def measured_sizes(most: int) -> tuple[int, ...]:
    return tuple(batch for batch in BATCHES if batch <= most)


def _recording_row(engine: Engine, seconds: list[float], shape: str) -> Row:
    """What a server with default flags would take, which records more sizes and numbers of drafts."""
    runner = engine._stepper._runner
    assert runner is not None, "the engine decodes on the device"
    num_recorded = len(runner._recordings)
    num_by_default = 2 * len(padded_sizes(max(BATCHES))) * (MAX_NUM_DRAFT_STEPS + 1)
    first, again = seconds
    expected = first + (num_by_default - num_recorded) * again / num_recorded
    return Row(
        f"{shape}, recording {num_by_default} CUDA graphs",
        RECORDING_GOAL,
        expected,
        "s",
        expected,
        note=f"from {num_recorded}, which took {first:.1f} s, and {again:.1f} s with all kernels made",
    )


def _step_row(place: Place, engine: Engine, config: ModelConfig, shape: str, plain: dict[int, Steps]) -> Row:
    plain[1] = steady(place, engine, 1, 0)
    context = PROMPT_LEN + ROUNDS * STEPS_PER_ROUND // 2
    num_bytes = step_bytes(config, 1) + config.num_hidden_layers * kv_bytes(config, context, 2)
    floor = num_bytes / place.copy_bandwidth
    return Row(
        f"{shape}, batch 1, no drafts, a step",
        STEP_GOAL,
        1e3 * plain[1].seconds,
        "ms",
        plain[1].seconds / floor,
        1e3 * floor,
        "bytes / copy bandwidth",
        f"{num_bytes / 1e9:.1f} GB, {plain[1].throughput:.0f} tok/s",
    )


def _idle_row(place: Place, engine: Engine, batch: int, shape: str) -> Row:
    """What a step takes beyond its recording, replayed again and again. Copies to and from the host count as idle."""
    turns = [
        (steady(place, engine, batch, 0).seconds, busy_seconds(place, engine, batch))
        for _ in range(IDLE_TURNS if not place.is_rehearsal else 1)
    ]
    step, busy = (statistics.median(of_turn) for of_turn in zip(*turns, strict=True))
    share = max(1 - busy / step, 0.0)
    return Row(
        f"{shape}, batch {batch}, no drafts, the GPU waits between steps",
        IDLE_GOAL,
        100 * share,
        "%",
        share,
        note=f"a step takes {1e3 * step:.3f} ms, its recording alone {1e3 * busy:.3f} ms",
    )


def _gaps_row(place: Place, engine: Engine, shape: str) -> Row:
    """What is idle by the kernels' own times, gaps within a step included; these need a profiler, which costs time."""
    share = idle_share(kernel_intervals(place, engine, 1))
    return Row(
        f"{shape}, batch 1, no drafts, no kernel runs",
        Goal(),
        100 * share,
        "%",
        share,
        note="by the profiler's times, gaps within steps included",
    )


def _drafts_row(
    place: Place, engine: Engine, config: ModelConfig, batch: int, shape: str, plain: dict[int, Steps]
) -> Row:
    """The goal is for the whole model; with fewer layers drafts cost a larger share, and the goal shrinks alike."""
    if batch not in plain:
        plain[batch] = steady(place, engine, batch, 0)
    drafted = steady(place, engine, batch, NUM_DRAFTS)
    accept_length = drafted.tokens / batch
    best = best_ratio(config, batch, NUM_DRAFTS, ACCEPT_LENGTH)
    of_whole = best_ratio(config_of(NAME, place), batch, NUM_DRAFTS, ACCEPT_LENGTH)
    goal = DRAFT_GOALS.get(batch, 1.0)
    scaled = "" if best == of_whole else f"; the whole model's goal is {goal:g}, its limit {of_whole:.2f}"
    return Row(
        f"{shape}, batch {batch}, {NUM_DRAFTS} drafts, accept length {accept_length:.2f}",
        Goal(at_least=round(goal * best / of_whole, 2)),
        drafted.throughput,
        "tok/s",
        drafted.throughput / plain[batch].throughput,
        plain[batch].throughput,
        "no drafts",
        f"limit by bytes with random routing {best:.2f}; steps {1e3 * plain[batch].seconds:.2f} and "
        f"{1e3 * drafted.seconds:.2f} ms{_routing(place, engine, config, batch)}{scaled}",
    )


def _routing(place: Place, engine: Engine, config: ModelConfig, batch: int) -> str:
    """How many experts the random weights choose in fact; neighbours may choose alike."""
    try:
        found = [touched_experts(place, engine, batch, drafts) for drafts in (0, NUM_DRAFTS)]
    except Exception as error:  # the figure of the row is there already
        return f"; experts read: {type(error).__name__}: {error}"
    moved = [step_bytes(config, batch, found[0]), step_bytes(config, batch * (NUM_DRAFTS + 1), found[1])]
    return (
        f"; experts read per layer {found[0]:.1f} and {found[1]:.1f}, {moved[0] / 1e9:.1f} and {moved[1] / 1e9:.1f} GB"
    )


class _Running:
    """Sequences that decode, until the block ends. No step of theirs ends one."""

    def __init__(self, place: Place, engine: Engine, batch: int, num_drafts: int) -> None:
        self.engine = engine
        self.num_drafts = num_drafts
        self.batch = batch
        self.prompt_len = PROMPT_LEN if not place.is_rehearsal else 8

    def __enter__(self) -> _Running:
        try:
            self._start()
        except BaseException:
            self.engine.abort(None)
            raise
        return self

    def _start(self) -> None:
        draw = random.Random(0)
        for i in range(self.batch):
            prompt = [draw.randrange(self.engine.vocab_size) for _ in range(self.prompt_len)]
            sampling = TokenSampling(max_new_tokens=CONTEXT - PROMPT_LEN, seed=0, temperature=0.0, ignore_eos=True)
            assert self.engine.add(AddRequest(rid=f"run-{i}", input_ids=prompt, sampling=sampling)) is None
        while self.engine.scheduler.num_decoding < self.batch:
            self.step()

    def step(self) -> int:
        """Returns the number of tokens it brought."""
        return sum(len(output.token_ids) for output in self.engine.step(self.num_drafts))

    def __exit__(self, *error: object) -> None:
        self.engine.abort(None)
        while self.engine.has_work:
            self.step()
        self.engine.step()  # lets go of a step that was under way


def steady(place: Place, engine: Engine, batch: int, num_drafts: int) -> Steps:
    """The median of rounds of steps, each as the engine makes them: with their tokens read and their outputs made."""
    rounds, length, warm = (ROUNDS, STEPS_PER_ROUND, WARM_STEPS) if not place.is_rehearsal else (1, 2, 1)
    runner = engine._stepper._runner
    assert runner is not None, "the engine decodes on the device"
    if not place.is_rehearsal and (batch, num_drafts, True) not in runner._recordings:
        raise RuntimeError(f"no step of {batch} sequences and {num_drafts} drafts was recorded")
    with _Running(place, engine, batch, num_drafts) as running:
        for _ in range(warm):
            running.step()
        seconds, tokens = [], 0
        for _ in range(rounds):
            started = time.perf_counter()
            tokens += sum(running.step() for _ in range(length))
            seconds.append((time.perf_counter() - started) / length)
    return Steps(statistics.median(seconds), tokens / (rounds * length))


Intervals = list[tuple[float, float]]
"""Start and end of work, in seconds."""


def idle_share(busy: Intervals) -> float:
    """1 - busy / wall, from the first start to the last end; intervals may overlap."""
    ordered = sorted(busy)
    (first, reached), idle = ordered[0], 0.0
    for start, end in ordered[1:]:
        idle += max(start - reached, 0.0)
        reached = max(reached, end)
    return idle / (reached - first) if reached > first else 0.0


def busy_seconds(place: Place, engine: Engine, batch: int) -> float:
    """What a decode step's recording takes, replayed without a pause; in a rehearsal, what a step does."""
    runner = engine._stepper._runner
    assert runner is not None, "the engine decodes on the device"
    with _Running(place, engine, batch, 0) as running:
        for _ in range(WARM_STEPS if not place.is_rehearsal else 1):
            running.step()
        if place.is_rehearsal:
            started = time.perf_counter()
            running.step()
            return time.perf_counter() - started
        torch.cuda.synchronize()
        graph = runner._recordings[batch, 0, True].graph
        return statistics.median(replayed(graph, STEPS_PER_ROUND) for _ in range(ROUNDS))


def kernel_intervals(place: Place, engine: Engine, batch: int) -> Intervals:
    """When kernels and copies ran during ten steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with _Running(place, engine, batch, 0) as running:
        for _ in range(WARM_STEPS):
            running.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(10):
                running.step()
            torch.cuda.synchronize()
    spans = [one.time_range for one in profiler.events() or () if one.device_type == DeviceType.CUDA]
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    return [(span.start / 1e6, span.end / 1e6) for span in spans]


def touched_experts(place: Place, engine: Engine, batch: int, num_drafts: int) -> float:
    """Different routed experts per layer that a step's largest calls choose, in the mean: those of the target."""
    runner = engine._stepper._runner
    assert runner is not None, "the engine decodes on the device"
    chosen: list[torch.Tensor] = []

    def noting(function: Callable[..., Any], x: torch.Tensor, ids: torch.Tensor, *others: Any, **options: Any) -> Any:
        if ids.shape[0] == batch * (num_drafts + 1):
            chosen.append(ids)
        return function(x, ids, *others, **options)

    with _Running(place, engine, batch, num_drafts) as running, ExitStack() as patches:
        running.step()
        patches.enter_context(mock.patch.object(runner, "_recordings", {}))
        for name in ("fused_moe", "expert_terms"):
            patches.enter_context(mock.patch.object(moe, name, partial(noting, getattr(moe, name))))
        running.step()
        running.step()
    return statistics.mean(ids.unique().numel() for ids in chosen)
