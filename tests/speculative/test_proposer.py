"""Every draft the engine makes is the one that the definition gives for the same tokens, computed from scratch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.config.engine_config import EngineConfig
from nextn.execution.engine import Engine
from nextn.scheduler.scheduler import MAX_LAG, Decision, Extend, Scheduler
from nextn.speculative.logits import Row
from nextn.speculative.proposer import ChooseTokens, Drafts, NextNProposer

from tests.checkpoints import random_state, tiny_config, write_checkpoint
from tests.conftest import request, run_all
from tests.models.oracle import NextNReference, transformers_model

VOCAB = 8
CONFIG = tiny_config(vocab_size=VOCAB)


@dataclass(frozen=True)
class Chain:
    """Drafts after ``tokens``, and the head's logits for the first of them."""

    tokens: list[int]
    drafts: list[int]
    logits: torch.Tensor


class Recorder:
    """Notes every chain of drafts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chains: list[Chain] = []
        propose = NextNProposer.propose

        def recording(proposer: NextNProposer, extends: list[Extend], choose: ChooseTokens) -> Drafts:
            first: list[torch.Tensor] = []

            def noting(logits: torch.Tensor, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
                first.append(logits.clone())
                return choose(logits, rows)

            drafts = propose(proposer, extends, noting)
            for extend, chain, logits in zip(extends, drafts.tokens, first[0], strict=True):
                self.chains.append(Chain(list(extend.seq.tokens), chain, logits))
            return drafts

        monkeypatch.setattr(NextNProposer, "propose", recording)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state(CONFIG, seed=9)


@pytest.fixture(scope="module")
def reference(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> NextNReference:
    folder = tmp_path_factory.mktemp("oracle")
    return NextNReference(transformers_model(folder, CONFIG, state), state)


@torch.inference_mode()
def defined_chain(reference: NextNReference, tokens: list[int], num_drafts: int) -> Chain:
    """Greedy drafts after ``tokens``: hidden states of all but the last token, each with the token after it."""
    hidden = reference.target.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
    ids = tokens[1:]
    chain: list[int] = []
    first: list[torch.Tensor] = []
    for _ in range(num_drafts):
        out = reference(torch.tensor(ids), hidden, torch.arange(len(ids)))
        first.append(out[-1] @ reference.head.t())
        chain.append(int(first[-1].argmax()))
        ids = [*ids, chain[-1]]
        hidden = torch.cat([hidden, out[-1:]])
    return Chain(tokens, chain, first[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_prefill_size": 3},
        {"page_size": 4, "max_total_tokens": 100},
        {"page_size": 1},
        {"enable_prefix_cache": False, "num_draft_steps": 5},
    ],
    ids=["plain", "chunks of 3", "preemption", "pages of one token", "five drafts"],
)
def test_drafts_are_those_of_the_definition(
    options: dict[str, Any],
    state: dict[str, torch.Tensor],
    reference: NextNReference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, state=state, dtype=torch.float32)
    recorder = Recorder(monkeypatch)
    engine = Engine(EngineConfig(**{"model_path": str(folder), "num_draft_steps": 3, **options}))
    recorder.chains.clear()
    shared = [(5 * i) % VOCAB for i in range(17)]
    prompts = [shared, [*shared, 3, 4], [5], [*shared[:9], 1, 2, 3], list(range(VOCAB)) * 3]
    run_all(engine, [request(str(i), prompt, 20) for i, prompt in enumerate(prompts)])
    run_all(engine, [request(f"again {i}", prompt, 6) for i, prompt in enumerate(prompts)])
    assert len(recorder.chains) > 60
    for found in recorder.chains:
        expected = defined_chain(reference, found.tokens, len(found.drafts))
        assert found.drafts == expected.drafts, f"after {found.tokens}"
        # float32 sums in another order; a single wrong entry moves the logits by over 1e-3.
        torch.testing.assert_close(
            found.logits, expected.logits, rtol=0, atol=2e-5 * float(expected.logits.abs().max())
        )
    stats = engine.stats()
    assert 0 < sum(stats.accepted_per_position) < sum(stats.drafted_per_position), "accept and reject must both occur"
    assert (stats.num_preemptions > 0) == ("max_total_tokens" in options)
    assert (stats.cached_tokens > 0) == options.get("enable_prefix_cache", True)


def test_drafts_are_those_of_the_definition_after_steps_without_any(
    state: dict[str, torch.Tensor], reference: NextNReference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing is drafted, no entries are made; they are there when drafts start from them."""
    folder = write_checkpoint(tmp_path, CONFIG, state=state, dtype=torch.float32)
    recorder = Recorder(monkeypatch)
    engine = Engine(EngineConfig(model_path=str(folder), num_draft_steps=3, page_size=4))
    recorder.chains.clear()
    pauses = itertools.cycle([0, 1, 2, 5, MAX_LAG - 1, MAX_LAG, MAX_LAG + 1, 3 * MAX_LAG])
    steps = itertools.chain.from_iterable([0] * pause + [2, 3, 1] for pause in pauses)
    schedule = Scheduler.schedule
    monkeypatch.setattr(Scheduler, "schedule", lambda self, num_drafts: schedule(self, next(steps)))
    lags: list[int] = []
    commit = Scheduler.commit

    def committing(self: Scheduler, extend: Extend, decision: Decision) -> list[int]:
        kept = commit(self, extend, decision)
        lags.append(extend.seq.num_computed - extend.seq.num_draft_computed)
        return kept

    monkeypatch.setattr(Scheduler, "commit", committing)
    prompts = [[(5 * i) % VOCAB for i in range(17)], [5], list(range(VOCAB)) * 3]
    run_all(engine, [request(str(i), prompt, 300 - 20 * i) for i, prompt in enumerate(prompts)])
    assert len(recorder.chains) > 30
    for found in recorder.chains:
        assert found.drafts == defined_chain(reference, found.tokens, len(found.drafts)).drafts, f"after {found.tokens}"
    assert max(lags) > 2 * MAX_LAG


def test_drafts_are_those_of_the_definition_over_a_prefix_that_was_cached_without_draft_entries(
    state: dict[str, torch.Tensor], reference: NextNReference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, state=state, dtype=torch.float32)
    recorder = Recorder(monkeypatch)
    engine = Engine(EngineConfig(model_path=str(folder), num_draft_steps=3, page_size=4))
    recorder.chains.clear()
    schedule = Scheduler.schedule
    num_drafts = 0
    monkeypatch.setattr(Scheduler, "schedule", lambda self, _: schedule(self, num_drafts))
    shared = [(5 * i) % VOCAB for i in range(37)]
    run_all(engine, [request("first", shared, 12)])
    assert not recorder.chains
    num_drafts = 3
    for i, tail in enumerate(([3], [3], [1, 2])):
        run_all(engine, [request(str(i), [*shared, *tail], 12)])
    assert engine.stats().cached_tokens >= 3 * 36
    assert len(recorder.chains) > 10
    for found in recorder.chains:
        assert found.drafts == defined_chain(reference, found.tokens, len(found.drafts)).drafts, f"after {found.tokens}"
