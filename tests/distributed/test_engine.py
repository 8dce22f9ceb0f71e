"""An engine over several ranks says and counts what one rank does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.execution.engine import Engine
from nextn.layers.batch import make_extend_batch
from nextn.protocol.messages import AddRequest, RequestOutput
from nextn.text.grammar import regex_form

from tests.checkpoints import END_OF_LETTERS, said_in_letters, tiny_config, write_checkpoint, write_letters
from tests.conftest import request, run_all, run_outputs
from tests.distributed.conftest import EngineContext
from tests.execution.test_engine import prompts

TOLERANCE = 2e-5
"""Of the largest value: float32 sums in another order. A wrong scale, head or bias moves values by over 1e-2."""

OPTIONS: dict[str, Any] = {"num_draft_steps": 3, "chunked_prefill_size": 7, "page_size": 4, "max_running_requests": 8}


def checkpoint(folder: Path, quant: str = "channel", draft: str = "same", **config: Any) -> str:
    fields = tiny_config(**{"vocab_size": 24, **config})
    return str(write_checkpoint(folder, fields, quant=quant, draft=draft))  # type: ignore[arg-type]


def forward(engine: Engine, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of one forward of the target, over the pool's first pages."""
    cycle = engine._cycle
    pages = list(range(-(-len(tokens) // cycle._page_size)))
    cycle.leader.score(0, tokens, pages, 0)
    batch = make_extend_batch([(0, len(tokens))], [pages], cycle._page_size, torch.device("cpu"))
    with torch.inference_mode():
        hidden = cycle._target.forward(torch.tensor(tokens), batch, cycle._kv_cache)
        return hidden, cycle._target.compute_logits(hidden)


def requests() -> list[AddRequest]:
    """Greedy and sampled ones, with and without logprobs, of many lengths, some with a common beginning."""
    shared = [(5 * i) % 24 for i in range(19)]
    made = [request(f"greedy {i}", prompt, 20) for i, prompt in enumerate(prompts(4))]
    made += [request(f"shared {i}", [*shared, i, i + 1], 12, num_top_logprobs=2) for i in range(2)]
    made += [request("scored", prompts(1, seed=4, shortest=30)[0], 8, prompt_logprobs_start=0)]
    made += [request("sampled", shared[:11], 16, temperature=0.9, top_p=0.9, seed=11, repetition_penalty=1.1)]
    return made


def said(outputs: dict[str, list[RequestOutput]]) -> dict[str, list[tuple[int, ...]]]:
    """Of each request, per step: tokens, drafts, accepted drafts."""
    return {
        rid: [(*o.token_ids, *((s.num_drafted, s.num_accepted) for s in o.spec_steps)) for o in of_one]  # type: ignore[misc]
        for rid, of_one in outputs.items()
    }


def logprobs(outputs: dict[str, list[RequestOutput]]) -> list[float]:
    values = []
    for outputs_of_one in outputs.values():
        for output in outputs_of_one:
            for one in (*(output.prompt_logprobs or ()), *(output.logprobs or ())):
                values += [one.logprob] if one.logprob is not None else []
                values += [value for _, value in one.top or ()]
    return values


@pytest.mark.parametrize(
    ("quant", "draft", "config"),
    [
        ("none", "same", {"vocab_size": 24}),
        ("channel", "same", {}),
        ("channel", "bf16_ignored", {"tie_word_embeddings": True, "n_shared_experts": 0}),
        ("tensor_static", "same", {"attention_bias": False}),
        ("block", "same", {"moe_intermediate_size": 40, "intermediate_size": 88, "n_shared_experts": 2}),
        ("ct_block", "same", {"vocab_size": 25, "num_key_value_heads": 1}),
    ],
    ids=["BF16", "per channel", "BF16 draft, tied head", "per tensor, static", "uneven blocks", "one KV head"],
)
def test_two_ranks_compute_and_say_what_one_does(
    engine_over: EngineContext, folder: Path, quant: str, draft: str, config: dict[str, Any]
) -> None:
    options = {**OPTIONS, "model_path": checkpoint(folder, quant, draft, **config)}
    found = []
    for num_ranks in (1, 2):
        with engine_over(num_ranks, **options) as engine:
            hidden, logits = forward(engine, prompts(1, seed=8, shortest=50)[0])
            cold, warm = (run_outputs(engine, requests()) for _ in range(2))
            found.append((hidden, logits, cold, warm, engine.stats()))
    (hidden, logits, cold, warm, stats), (hidden_2, logits_2, cold_2, warm_2, stats_2) = found
    for one, two in ((hidden, hidden_2), (logits, logits_2)):
        torch.testing.assert_close(two, one, rtol=0, atol=TOLERANCE * float(one.abs().max()))
    assert said(cold_2) == said(cold)
    assert said(warm_2) == said(warm)
    assert logprobs(cold_2) == pytest.approx(logprobs(cold), abs=1e-4)  # of values up to 10
    assert len(logprobs(cold)) > 100
    assert stats_2.accept_length == stats.accept_length > 1
    assert stats_2.cached_tokens == stats.cached_tokens > 100
    assert stats_2.accepted_per_position == stats.accepted_per_position


def test_a_grammar_holds_the_output_of_two_ranks(engine_over: EngineContext, folder: Path) -> None:
    """Rank 0 alone knows it; the other one computes the same steps."""
    path = checkpoint(folder, vocab_size=40, eos_token_id=[END_OF_LETTERS])
    write_letters(Path(path))
    fields: dict[str, Any] = {
        "grammar": regex_form("[ab]{4}-[0-9]{6}!", "regex", str).as_grammar(),
        "ignore_eos": False,
    }
    asked = [request(str(i), [5 * i + 1, 7], 20, temperature=float(i % 2), seed=i, **fields) for i in range(4)]
    asked += [request("free", [9, 1], 20)]
    found = []
    for num_ranks in (1, 2):
        for on_device in (False, True):
            with engine_over(num_ranks, **OPTIONS, model_path=path, decode_on_device=on_device) as engine:
                found.append(run_all(engine, asked))
    assert found[2:] == found[:2]
    assert all(re.fullmatch("[ab]{4}-[0-9]{6}!", said_in_letters(found[0][str(i)])) for i in range(4))


def test_four_ranks_share_two_kv_heads(engine_over: EngineContext, folder: Path) -> None:
    options = {
        **OPTIONS,
        "model_path": checkpoint(folder, moe_intermediate_size=64, vocab_size=27),
    }
    found = []
    for num_ranks in (1, 4):
        with engine_over(num_ranks, **options) as engine:
            assert engine._cycle._kv_cache.k.shape[3] == {1: 2, 4: 1}[num_ranks]
            found.append(said(run_outputs(engine, [request(str(i), p, 10) for i, p in enumerate(prompts(3))])))
    assert found[0] == found[1]


def test_preemption_aborts_policy_and_shadow_check_keep_the_ranks_together(
    engine_over: EngineContext, folder: Path
) -> None:
    options = {**OPTIONS, "model_path": checkpoint(folder), "num_draft_steps": None, "max_total_tokens": 120}
    wanted = [request(str(i), p, 30) for i, p in enumerate(prompts(6, seed=5, shortest=10, longest=30))]
    with engine_over(1, **{**options, "max_total_tokens": None}) as roomy:
        expected = run_all(roomy, wanted)
    with engine_over(2, **options, shadow_rate=1.0) as engine:
        assert run_all(engine, wanted) == expected
        assert engine.stats().num_preemptions > 0
        for one in wanted:
            engine.add(one)
        for _ in range(3):
            engine.step()
        assert len(engine.abort(None)) == len(wanted)
        while engine.has_background_work:
            engine.work_in_background()
        engine.flush_cache()
        assert run_all(engine, wanted[:2]) == {rid: expected[rid] for rid in ("0", "1")}
        while engine.has_background_work:
            engine.work_in_background()
        shadow = engine.draft_health().shadow
        assert shadow is not None
        assert (shadow.num_requests, shadow.num_disagreements) == (8, 0)


@pytest.mark.parametrize("num_draft_steps", [3, None])
def test_ranks_follow_decode_steps_on_the_device(
    engine_over: EngineContext, folder: Path, num_draft_steps: int | None
) -> None:
    """Greedy and sampled, with rules and chunks; a rank knows from its own state what it computes next."""
    options = {**OPTIONS, "model_path": checkpoint(folder), "num_draft_steps": num_draft_steps}
    with engine_over(1, **options) as plain:
        expected, stats = run_all(plain, requests()), plain.stats()
    with engine_over(2, **options, decode_on_device=True) as engine:
        assert run_all(engine, requests()) == expected
        if num_draft_steps is not None:
            assert engine.stats().accepted_per_position == stats.accepted_per_position
