"""The engine on a small real model: speculation, chunks, prefixes, batches and preemption change nothing but speed."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from nextn import demo
from nextn.config.engine_config import EngineConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.execution.counters import Counters
from nextn.execution.engine import Engine
from nextn.protocol.messages import AddRequest
from nextn.scheduler.scheduler import Decision, Extend
from nextn.speculative.policy import DraftLengthPolicy
from scipy import stats

from tests.checkpoints import State, tiny_config, write_checkpoint
from tests.conftest import EngineFactory, request, run_all, run_outputs

VOCAB = 24


def prompts(num: int, seed: int = 0, shortest: int = 1, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(shortest, longest)).tolist() for _ in range(num)]


@pytest.fixture(scope="module")
def plain_outputs(make_engine: EngineFactory) -> dict[str, list[int]]:
    """Greedy outputs one request at a time, without drafts, prefix cache or chunks: what all else must equal."""
    engine = make_engine(num_draft_steps=0, enable_prefix_cache=False, chunked_prefill_size=-1)
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts(8)):
        outputs |= run_all(engine, [request(str(i), prompt)])
    return outputs


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 5, None])
@pytest.mark.parametrize("together", [True, False])
def test_greedy_output_does_not_depend_on_drafts_or_batching(
    make_engine: EngineFactory,
    plain_outputs: dict[str, list[int]],
    num_drafts: int | None,
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(num_draft_steps=num_drafts)
    choices = itertools.cycle([3, 0, 0, 1, 5, 0, 2, 4])  # a random model's drafts are so bad that it would choose 0
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: next(choices))
    requests = [request(str(i), prompt) for i, prompt in enumerate(prompts(8))]
    outputs = (
        run_all(engine, requests) if together else {k: v for r in requests for k, v in run_all(engine, [r]).items()}
    )
    assert outputs == plain_outputs
    assert (engine.stats().num_verify_passes > 0) == (num_drafts != 0)


def test_the_policy_is_not_told_that_drafting_takes_what_catching_up_does(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that drafts after some that did not makes their entries as well."""
    for num_idle, is_told in ((3, True), (9, False)):
        engine = make_engine(num_draft_steps=None)
        choices = itertools.chain([1, 1], [0] * num_idle, [2], itertools.repeat(1))
        told: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(DraftLengthPolicy, "choose", lambda *_, choices=choices, **__: next(choices))
            patch.setattr(DraftLengthPolicy, "observe", lambda self, n, k, *_, told=told, **__: told.append(k))
            run_all(engine, [request("a", [5, 6, 7], 40)])
        assert (2 in told) == is_told
        assert told.count(0) >= num_idle


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 64])
def test_greedy_output_does_not_depend_on_where_chunks_end(
    make_engine: EngineFactory, plain_outputs: dict[str, list[int]], chunk: int
) -> None:
    engine = make_engine(chunked_prefill_size=chunk, page_size=4)
    assert run_all(engine, [request(str(i), p) for i, p in enumerate(prompts(8))]) == plain_outputs


def test_a_cached_prefix_gives_the_same_tokens_and_the_same_acceptance(
    make_engine: EngineFactory, plain_outputs: dict[str, list[int]]
) -> None:
    cold = make_engine(page_size=4, enable_prefix_cache=False)
    warm = make_engine(page_size=4)
    for engine in (cold, warm):
        for _ in range(2):
            for i, prompt in enumerate(prompts(8)):
                assert run_all(engine, [request(str(i), prompt)])[str(i)] == plain_outputs[str(i)]
    assert warm.stats().cached_tokens > 100
    assert cold.stats().cached_tokens == 0
    # The draft's KV came along with the prefix, so every draft was accepted or rejected just as without the cache.
    assert warm.stats().accepted_per_position == cold.stats().accepted_per_position
    assert warm.stats().drafted_per_position == cold.stats().drafted_per_position


def test_acceptance_does_not_depend_on_chunk_size(make_engine: EngineFactory) -> None:
    accepted = set()
    for chunk in (1, 3, 16, -1):
        engine = make_engine(chunked_prefill_size=chunk)
        run_all(engine, [request(str(i), p) for i, p in enumerate(prompts(6, seed=3))])
        found = engine.stats()
        assert sum(found.accepted_per_position) > 0, "nothing was ever accepted, so the test shows nothing"
        accepted.add((tuple(found.accepted_per_position), found.num_verify_passes))
    assert len(accepted) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preempted_requests_resume_exactly(make_engine: EngineFactory, temperature: float) -> None:
    def requests() -> list[AddRequest]:
        return [
            request(str(i), p, 40, temperature=temperature, seed=i)
            for i, p in enumerate(prompts(6, seed=5, shortest=10, longest=30))
        ]

    roomy = make_engine(page_size=4)
    tight = make_engine(page_size=4, max_total_tokens=120)
    assert run_all(tight, requests()) == run_all(roomy, requests())
    assert tight.stats().num_preemptions > 0
    assert roomy.stats().num_preemptions == 0


def test_seeded_sampling_does_not_depend_on_the_batch(make_engine: EngineFactory) -> None:
    def one(i: int) -> AddRequest:
        return request(str(i), prompts(6, seed=7)[i], temperature=0.8, top_p=0.9, seed=100 + i)

    alone = {k: v for i in range(6) for k, v in run_all(make_engine(), [one(i)]).items()}
    together = run_all(make_engine(), [one(i) for i in range(6)])
    chunked = run_all(make_engine(chunked_prefill_size=5, page_size=4), [one(i) for i in reversed(range(6))])
    adaptive = run_all(make_engine(num_draft_steps=None), [one(i) for i in range(6)])
    assert alone == together == chunked == adaptive
    assert len({tuple(tokens) for tokens in alone.values()}) == 6


def test_sampled_tokens_have_the_targets_distribution(make_engine: EngineFactory) -> None:
    """Two tokens after a prompt, with and without drafts: the same distribution over pairs, by a chi-squared test."""
    num = 4000
    counts = []
    for num_drafts in (0, 2):
        engine = make_engine(num_draft_steps=num_drafts, max_running_requests=64, max_queued_requests=num)
        outputs = run_all(
            engine,
            [
                request(str(i), [1, 2, 3, 4], 3, temperature=1.5, top_k=4, seed=i + 10_000_000 * num_drafts)
                for i in range(num)
            ],
        )
        counts.append(Counter(tuple(tokens[1:]) for tokens in outputs.values()))
    common = [pair for pair in counts[0] | counts[1] if counts[0][pair] + counts[1][pair] >= 20]
    table = [[count[pair] for pair in common] for count in counts]
    assert len(common) > 5
    assert stats.chi2_contingency(table).pvalue > 1e-3


SAMPLING_RULES = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0}},
    "minimum": {"min_new_tokens": 12, "ignore_eos": False, "stop_token_ids": tuple(range(12))},
    "stops": {"stop_token_ids": (3, 9, 14)},
    "all": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}, "stop_token_ids": (2,)},
}


@pytest.mark.parametrize("rule", SAMPLING_RULES)
def test_sampling_rules_are_exact_at_every_draft_position(make_engine: EngineFactory, rule: str) -> None:
    def requests() -> list[AddRequest]:
        return [request(str(i), p, **SAMPLING_RULES[rule]) for i, p in enumerate(prompts(6, seed=11))]

    plain = run_all(make_engine(num_draft_steps=0), requests())
    drafted = make_engine(num_draft_steps=4)
    assert run_all(drafted, requests()) == plain
    unruled = run_all(make_engine(), [request(str(i), p) for i, p in enumerate(prompts(6, seed=11))])
    assert plain != unruled, "the rule changed nothing, so the test shows nothing"


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_each_output_says_how_its_tokens_came_about(make_engine: EngineFactory, num_drafts: int) -> None:
    """Also where a stop token, or the length, cuts the accepted drafts."""
    engine = make_engine(num_draft_steps=num_drafts)
    requests = [
        request(str(i), ids, 17, temperature=1.5, ignore_eos=False, stop_token_ids=(3, 5))
        for i, ids in enumerate(prompts(12))
    ]
    num_drafted = num_accepted = 0
    for outputs in run_outputs(engine, requests).values():
        for output in outputs:
            (step,) = output.spec_steps
            assert step.num_tokens == len(output.token_ids)
            assert step.num_accepted <= step.num_tokens <= step.num_accepted + 1
            assert step.num_accepted <= step.num_drafted <= num_drafts
            num_drafted += step.num_drafted
            num_accepted += step.num_accepted
        assert sum(output.spec_steps[0].num_drafted for output in outputs) == outputs[-1].num_drafted
        assert sum(output.spec_steps[0].num_accepted for output in outputs) == outputs[-1].num_accepted
    assert (num_drafted > num_accepted > 0) == (num_drafts > 0)


def test_accepted_drafts_behind_a_requests_end_do_not_count(make_engine: EngineFactory) -> None:
    seq = make_engine().scheduler.add(request("a", [5, 6, 7, 8]))
    counters = Counters(3)
    extend = Extend(seq, 3, 1, 3, decides=True, wants_drafts=True)
    for kept in ([1, 2, 3, 4], [1, 2], [1]):
        counters.count(extend, Decision([1, 2, 3, 4], 3), kept, is_first=False)
    assert (counters.num_verify_passes, counters.drafted, counters.accepted) == (3, [3, 3, 3], [3, 2, 1])


def test_stop_tokens_wait_for_the_minimum_length(make_engine: EngineFactory) -> None:
    rules = SAMPLING_RULES["minimum"]
    for tokens in run_all(make_engine(), [request("a", [1, 2, 3], 30, **rules)]).values():
        assert len(tokens) > 12
        assert not set(tokens[:12]) & set(range(12))


def test_penalised_tokens_do_not_repeat(make_engine: EngineFactory) -> None:
    outputs = run_all(make_engine(), [request("a", [1], 20, frequency_penalty=1000.0)])
    assert len(set(outputs["a"])) == 20


def test_logprobs_are_the_models_and_equal_with_and_without_drafts(make_engine: EngineFactory) -> None:
    found = []
    for num_drafts in (0, 3):
        engine = make_engine(num_draft_steps=num_drafts, chunked_prefill_size=7)
        outputs = run_outputs(
            engine, [request("a", prompts(1, seed=2, shortest=30)[0], num_top_logprobs=3, prompt_logprobs_start=0)]
        )["a"]
        found.append(
            ([p for o in outputs for p in o.logprobs or []], [p for o in outputs for p in o.prompt_logprobs or []])
        )
    (plain, plain_prompt), (drafted, drafted_prompt) = found
    assert [p.token_id for p in drafted] == [p.token_id for p in plain]
    for a, b in zip(plain + plain_prompt[1:], drafted + drafted_prompt[1:], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)  # float32 sums in another order
        assert [t for t, _ in a.top] == [t for t, _ in b.top]
        assert a.top == sorted(a.top, key=lambda pair: -pair[1])
    assert all(p.top[0][0] == p.token_id for p in plain), "greedy takes the likeliest"
    assert (plain_prompt[0].logprob, len(plain_prompt)) == (None, len(prompts(1, seed=2, shortest=30)[0]))


def test_prompt_logprobs_are_complete_on_a_cached_prompt(make_engine: EngineFactory) -> None:
    engine = make_engine(page_size=4)
    prompt = prompts(1, seed=4, shortest=30)[0]
    run_all(engine, [request("warm", prompt)])
    for start in (0, 1, 9, len(prompt) - 1):
        outputs = run_outputs(engine, [request("a", prompt, 2, num_top_logprobs=0, prompt_logprobs_start=start)])["a"]
        known = outputs[0].prompt_logprobs or []
        assert [p.token_id for p in known] == prompt[start:]


def test_an_aborted_request_frees_its_pages_at_once_and_others_go_on(
    make_engine: EngineFactory, plain_outputs: dict[str, list[int]]
) -> None:
    for steps_before_abort in range(12):
        engine = make_engine(chunked_prefill_size=10)
        for i, prompt in enumerate(prompts(8)):
            engine.add(request(str(i), prompt))
        engine.add(request("victim", list(range(20)), 200))
        tokens: dict[str, list[int]] = {str(i): [] for i in range(8)} | {"victim": []}
        for _ in range(steps_before_abort):
            for output in engine.step():
                tokens[output.rid] += output.token_ids
        (last,) = engine.abort("victim")
        assert last.finish_reason == "abort"
        assert engine.abort("victim") == []
        engine.scheduler.check()
        while engine.has_work:
            for output in engine.step():
                tokens[output.rid] += output.token_ids
        tokens.pop("victim")
        assert tokens == plain_outputs
        assert engine.scheduler.pages.num_available == engine.scheduler.pages.num_pages


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", []), "prompt is empty"),
        (request("a", [1] * 600), "leaves no room"),
        (request("a", [VOCAB]), "outside the vocabulary"),
        (request("a", [1], stop_token_ids=(-1,)), "outside the vocabulary"),
        (request("a", [1], 0), "at least 1"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(
    make_engine: EngineFactory, bad: AddRequest, message: str
) -> None:
    engine = make_engine()
    engine.add(request("good", [1, 2], 4))
    refusal = engine.add(bad)
    assert refusal is not None
    assert (refusal.finish_reason, refusal.error_kind) == ("error", "invalid")
    assert message in (refusal.error or "")
    while engine.has_work:
        engine.step()
    assert engine.stats().num_finished == 1


def test_a_full_queue_refuses(make_engine: EngineFactory) -> None:
    engine = make_engine(max_running_requests=1, max_queued_requests=1)
    assert [engine.add(request(str(i), [1])) is None for i in range(3)] == [True, True, False]


def test_output_ends_at_the_context(make_engine: EngineFactory) -> None:
    engine = make_engine(context_length=40)
    (outputs,) = run_outputs(engine, [request("a", [1] * 30, 500)]).values()
    assert (outputs[-1].completion_tokens, outputs[-1].finish_reason) == (10, "length")


@pytest.mark.parametrize("decode_on_device", [False, True])
def test_an_eos_that_the_vocabulary_lacks_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, decode_on_device: bool
) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(eos_token_id=[1, 151329]))
    engine = Engine(EngineConfig(model_path=str(folder), max_total_tokens=512, decode_on_device=decode_on_device))
    assert engine.eos_token_ids == (1,)
    assert "eos_token_id: found 151329, which the vocabulary of 64 does not have" in caplog.text
    waiting = request("a", [5, 6], 8, min_new_tokens=4, ignore_eos=False)
    assert len(run_all(engine, [waiting])["a"]) >= 4


@pytest.mark.parametrize("where", ["model.layers.1.self_attn.o_proj", "lm_head"])
def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path, where: str) -> None:
    def spoil(state: State) -> None:
        state[f"{where}.weight"][3] = 3e38  # what it is multiplied with is too much for float32

    folder = write_checkpoint(tmp_path, tiny_config(), mutate=spoil)
    with pytest.raises(CheckpointError, match="computes NaN or infinite values for an ordinary prompt"):
        Engine(EngineConfig(model_path=str(folder), max_total_tokens=512))


def test_a_pool_that_no_memory_holds_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"--max-total-tokens: found 100000000000, whose KV takes .* GiB there are"):
        Engine(EngineConfig(model_path=str(demo.checkpoint_dir()), max_total_tokens=10**11))
