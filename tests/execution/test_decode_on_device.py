"""A GPU's way of decoding, run on the CPU: tensors alone, and steps launched before the last ones' tokens are known."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from nextn.execution.decode_runner import DecodeRunner, padded_sizes
from nextn.kernels import native
from nextn.protocol.messages import AddRequest
from nextn.speculative.cycle import SpeculativeCycle
from nextn.speculative.policy import DraftLengthPolicy

from tests.conftest import EngineFactory, request, run_all, run_outputs
from tests.execution.test_engine import prompts


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences in every step of the decode runner."""
    sizes: list[int] = []
    launch = DecodeRunner.launch
    monkeypatch.setattr(
        DecodeRunner, "launch", lambda self, batch, *more: sizes.append(len(batch.slots)) or launch(self, batch, *more)
    )
    return sizes


def _requests(num: int, **fields: object) -> list[AddRequest]:
    return [request(str(i), prompt, **fields) for i, prompt in enumerate(prompts(num))]  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_drafts", [0, 1, 3, 5])
def test_greedy_output_and_acceptance_are_those_of_the_plain_step(
    make_engine: EngineFactory, launches: list[int], num_drafts: int, overlap: bool
) -> None:
    plain = make_engine(num_draft_steps=num_drafts)
    expected = run_all(plain, _requests(8, max_new_tokens=40))
    engine = make_engine(num_draft_steps=num_drafts, decode_on_device=True, enable_overlap=overlap)
    launches.clear()
    assert run_all(engine, _requests(8, max_new_tokens=40)) == expected
    assert len(launches) > 5, "the runner computed the steps"
    assert engine.stats().accepted_per_position == plain.stats().accepted_per_position
    assert engine.stats().drafted_per_position == plain.stats().drafted_per_position


@pytest.mark.parametrize("overlap", [True, False])
def test_a_changing_number_of_drafts_changes_nothing(
    make_engine: EngineFactory, launches: list[int], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_all(make_engine(num_draft_steps=0), _requests(8))
    engine = make_engine(num_draft_steps=None, decode_on_device=True, enable_overlap=overlap)
    choices = itertools.cycle([3, 3, 0, 0, 1, 5, 5, 0, 2, 4])
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: next(choices))
    launches.clear()
    assert run_all(engine, _requests(8)) == expected
    assert len(launches) > 5


@pytest.mark.parametrize("overlap", [True, False])
def test_a_seed_draws_the_tokens_that_it_draws_in_the_plain_step(
    make_engine: EngineFactory, launches: list[int], overlap: bool
) -> None:
    mixed = [
        {"temperature": 1.0, "has_own_seed": True},
        {"temperature": 0.7, "top_p": 0.8, "has_own_seed": True},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 5, "min_p": 0.05, "has_own_seed": True},
    ]
    requests = [
        request(str(i), prompt, seed=100 + i, **mixed[i % 4])  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts(8))
    ]
    expected = run_all(make_engine(), requests)
    launches.clear()
    assert run_all(make_engine(decode_on_device=True, enable_overlap=overlap), requests) == expected
    assert len(launches) > 5


def test_requests_that_come_and_go_change_nothing(make_engine: EngineFactory, launches: list[int]) -> None:
    """With chunks, cached prefixes, preemption and few slots; sequences end while the next step is under way."""
    options = {"page_size": 4, "chunked_prefill_size": 7, "max_running_requests": 3, "max_total_tokens": 260}
    requests = [request(str(i), p, max_new_tokens=5 + 7 * i) for i, p in enumerate(prompts(10))]
    requests += [request(f"again {i}", p, max_new_tokens=9) for i, p in enumerate(prompts(10))]
    expected = run_all(make_engine(**options), requests)
    engine = make_engine(decode_on_device=True, **options)
    launches.clear()
    assert run_all(engine, requests) == expected
    assert len(launches) > 20
    assert engine.stats().cached_tokens > 0


@pytest.mark.parametrize("on_device", [True, False])
def test_pages_taken_over_without_draft_entries_are_not_said_to_have_them(
    make_engine: EngineFactory, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request finds its own output cached by the first, which drafted nothing, while a step is under way."""
    drafts = [0]
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: drafts[0])
    engine = make_engine(num_draft_steps=None, decode_on_device=on_device, page_size=16)
    prompt = prompts(1, seed=3, shortest=30)[0]
    (first,) = run_all(engine, [request("first", prompt, 120)]).values()
    drafts[0] = 3
    assert run_all(engine, [request("second", prompt, 120)]) == {"second": first}

    tokens = prompt + first
    nodes = engine.scheduler.pages.cache.match(tokens, "", len(tokens))
    num_made = sum(1 for _ in itertools.takewhile(lambda node: node.has_draft, nodes))
    assert num_made > 3
    proposer, kv_cache = engine._cycle._proposer, engine._cycle._kv_cache
    assert proposer is not None
    said = kv_cache.k[-1].clone()
    seq = SimpleNamespace(tokens=tokens, pages=[node.page for node in nodes])
    with torch.inference_mode():
        proposer.draft.write_kv(*proposer._entries([(seq, 1, 16 * num_made)]), kv_cache)  # type: ignore[list-item]
    torch.testing.assert_close(said, kv_cache.k[-1])


def test_a_stop_token_inside_an_accepted_chain_ends_the_request_there(make_engine: EngineFactory) -> None:
    requests = [request(str(i), p, ignore_eos=False, max_new_tokens=60) for i, p in enumerate(prompts(12))]
    expected = run_all(make_engine(), requests)
    assert any(tokens[-1] in (1, 2) for tokens in expected.values())
    assert run_all(make_engine(decode_on_device=True), requests) == expected


RULES: list[dict[str, object]] = [
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4, "temperature": 0.9, "has_own_seed": True},
    {"repetition_penalty": 1.4},
    {"logit_bias": {3: 4.0, 7: -9.0}, "temperature": 1.0, "has_own_seed": True},
    {"min_new_tokens": 12, "ignore_eos": False},
    {},
]


@pytest.mark.parametrize("overlap", [True, False])
def test_penalties_biases_and_least_lengths_hold_at_every_draft(
    make_engine: EngineFactory, launches: list[int], overlap: bool
) -> None:
    """Prompts come in chunks, so that both ways of decoding take turns and what one decides, the other counts."""
    requests = [
        request(str(i), prompt, seed=i, **RULES[i % len(RULES)])  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts(12, shortest=20))
    ]
    options = {"chunked_prefill_size": 25, "max_running_requests": 5}
    expected = run_all(make_engine(**options), requests)
    plain = run_all(make_engine(**options), [request(r.rid, r.input_ids) for r in requests])
    assert sum(expected[rid] != plain[rid] for rid in plain) >= 6, "the rules matter"
    launches.clear()
    assert run_all(make_engine(decode_on_device=True, enable_overlap=overlap, **options), requests) == expected
    assert len(launches) > 20


def test_log_probabilities_are_left_to_the_plain_step(make_engine: EngineFactory, launches: list[int]) -> None:
    requests = [request("a", [5, 6, 7], num_top_logprobs=2), request("b", [8, 9], max_new_tokens=60)]
    expected = run_outputs(make_engine(), requests)
    launches.clear()
    found = run_outputs(make_engine(decode_on_device=True), requests)
    got, wanted = ([one for o in outputs["a"] for one in o.logprobs or ()] for outputs in (found, expected))
    assert got == wanted or native.cpu is None
    assert [one.token_id for one in got] == [one.token_id for one in wanted]
    # Without compiled kernels the last bits depend on what else is in the batch.
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert dict(mine.top) == pytest.approx(dict(theirs.top), abs=1e-4)
    assert all(output.logprobs for output in found["a"])
    assert launches, "once it has ended, the other goes on without the plain step"


def test_an_aborted_request_frees_its_pages_while_a_step_is_under_way(make_engine: EngineFactory) -> None:
    expected = run_all(make_engine(), _requests(4, max_new_tokens=40))
    engine = make_engine(decode_on_device=True)
    for one in _requests(4, max_new_tokens=40):
        assert engine.add(one) is None
    found: dict[str, list[int]] = {str(i): [] for i in range(4)}
    for step in itertools.count():
        for output in engine.step():
            found[output.rid] += output.token_ids
        if step == 4:
            (aborted,) = engine.abort("2")
            assert aborted.finish_reason == "abort"
        engine.scheduler.check()
        if not engine.has_work:
            break
    assert {rid: found[rid] for rid in "013"} == {rid: expected[rid] for rid in "013"}
    assert found["2"] == expected["2"][: len(found["2"])]
    assert len(found["2"]) < 40
    assert engine.scheduler.pages.num_available == engine.scheduler.pages.num_pages
    assert run_all(engine, _requests(4, max_new_tokens=40)) == expected, "nothing is left of the aborted one"


def test_the_end_of_the_context_is_reached_as_in_the_plain_step(make_engine: EngineFactory) -> None:
    options = {"context_length": 64, "page_size": 8}
    requests = [request(str(i), p, max_new_tokens=100) for i, p in enumerate(prompts(6, longest=50))]
    expected = run_all(make_engine(**options), requests)
    assert all(len(p) + len(expected[str(i)]) == 64 for i, p in enumerate(prompts(6, longest=50)))
    assert run_all(make_engine(decode_on_device=True, **options), requests) == expected


def test_what_a_step_looks_at_beyond_the_context_is_on_the_scratch_page(make_engine: EngineFactory) -> None:
    """A chain's last drafts may stand there, and see all keys up to their own."""
    engine = make_engine(context_length=64, page_size=8, decode_on_device=True)
    run_all(engine, _requests(6, max_new_tokens=100))
    runner = engine._stepper._runner
    assert runner is not None
    state = runner._state
    assert state.page_table.shape[1] * 8 >= state.width
    assert bool((state.page_table[:-1, : 64 // 8] != state.scratch_page).any())
    assert bool((state.page_table[:, 64 // 8 :] == state.scratch_page).all())


def test_steps_without_drafts_stay_on_the_device(make_engine: EngineFactory, launches: list[int]) -> None:
    """However far the draft layer lags behind."""
    engine = make_engine(num_draft_steps=None, decode_on_device=True)
    assert engine.add(request("a", [5, 6, 7], max_new_tokens=80)) is None
    launches.clear()
    for _ in range(60):
        engine._stepper.step(0)
    assert len(launches) > 55


def test_a_prompt_does_not_take_the_others_off_the_device(make_engine: EngineFactory, launches: list[int]) -> None:
    requests = [
        request("decodes", [5, 6, 7], max_new_tokens=60),
        request("long", list(range(20)) * 3, max_new_tokens=5),
    ]
    expected = run_all(make_engine(chunked_prefill_size=5), requests)
    engine = make_engine(chunked_prefill_size=5, decode_on_device=True)
    found: dict[str, list[int]] = {"decodes": [], "long": []}
    assert engine.add(requests[0]) is None
    for _ in range(4):
        for output in engine.step():
            found[output.rid] += output.token_ids
    launches.clear()
    assert engine.add(requests[1]) is None
    while not found["long"]:
        for output in engine.step():
            found[output.rid] += output.token_ids
    assert len(launches) >= 60 // 5, "every chunk went along with a step on the device"
    while engine.has_work:
        for output in engine.step():
            found[output.rid] += output.token_ids
    assert found == expected


def test_trying_steps_of_padding_goes_on_for_ever(make_engine: EngineFactory) -> None:
    runner = make_engine(context_length=64, decode_on_device=True)._stepper._runner
    assert runner is not None
    for _ in range(80):
        runner.rehearse(4, 3, is_greedy=False)


def test_padded_sizes_waste_little_and_reach_the_largest() -> None:
    for most in (1, 2, 5, 16, 64, 100, 256):
        sizes = padded_sizes(most)
        assert sizes[-1] == most
        assert list(sizes) == sorted(set(sizes))
        for num in range(1, most + 1):
            assert next(size for size in sizes if size >= num) <= 1.5 * num


@pytest.mark.parametrize("num_drafts", [0, 1])
@pytest.mark.parametrize("decode_on_device", [False, True])
def test_the_policy_learns_beside_a_request_that_drafts_a_number_of_its_own(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, decode_on_device: bool, num_drafts: int
) -> None:
    engine = make_engine(num_draft_steps=None, decode_on_device=decode_on_device, max_running_requests=3)
    told: list[int] = []
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: num_drafts)
    monkeypatch.setattr(
        DraftLengthPolicy,
        "observe",
        lambda self, n, k, *_, has_fixed=False: told.append(k) if n and has_fixed else None,
    )
    seeded = request("seeded", [5, 6], 40, temperature=0.8, has_own_seed=True)
    run_all(engine, [request("a", [5, 6, 7], 100), request("b", [8, 9], 100), seeded])
    assert len(told) > 5
    assert set(told) == {num_drafts}


def test_the_policy_hears_what_it_takes_to_make_up_for_missing_entries(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is drafted for long, a step beside the runner's has to make entries before drafts are tried."""
    engine = make_engine(num_draft_steps=None, decode_on_device=True, max_running_requests=1)
    run_all(engine, [request("first", [5, 6, 7], 100)])
    num_steps = itertools.count(1)
    beside: list[int] = []
    told: list[int] = []
    run = SpeculativeCycle.run
    monkeypatch.setattr(SpeculativeCycle, "run", lambda self, some: beside.append(len(some)) or run(self, some))
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: 2 * (next(num_steps) % 40 < 4))
    monkeypatch.setattr(DraftLengthPolicy, "observe_catching_up", lambda self, n, *_, **__: told.append(n))
    run_all(engine, [request("a", [5, 6, 7, 8], 300)])
    assert told == beside[1:], "all but the prompt's step"
    assert len(told) > 5
