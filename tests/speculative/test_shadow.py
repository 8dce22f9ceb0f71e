"""The shadow check finds what a wrong verify pass says wrongly, and touches nothing that a user has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from nextn.execution.engine import Engine
from nextn.protocol.draft_health import ShadowCounts
from nextn.protocol.messages import AddRequest
from nextn.speculative import cycle, shadow

from tests.conftest import EngineFactory, request, run_all

RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {3: 4.0, 5: -100.0}},
    {"ignore_eos": False, "stop_token_ids": (3, 4, 5), "min_new_tokens": 6},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 0.8, "top_p": 0.6},
    {"temperature": 1.2, "min_p": 0.2, "repetition_penalty": 1.2},
]


def requests(num: int, longest: int = 200, **fields: Any) -> list[AddRequest]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (num,), generator=generator).tolist()
    return [
        request(f"r{i}", torch.randint(0, 24, (length,), generator=generator).tolist(), 40, seed=i, **fields)
        for i, length in enumerate(lengths)
    ]


def counts(engine: Engine) -> ShadowCounts:
    """What the check has found once it has nothing left to do; it must then hold nothing."""
    while engine.has_background_work:
        engine.work_in_background()
    pages = engine.scheduler.pages
    assert pages.num_available == pages.num_pages, "the check keeps pages"
    engine.scheduler.check()
    found = engine.draft_health().shadow
    assert found is not None
    return found


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_speculation_said_is_confirmed_under_every_rule(
    make_engine: EngineFactory, rule: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(shadow_rate=1.0)
    said = run_all(engine, requests(12, **rule))
    assert counts(engine) == ShadowCounts(num_requests=12, num_tokens=sum(map(len, said.values())))
    assert lines(caplog) == []
    assert engine.draft_health().complaint is None


def test_users_get_the_same_and_count_the_same(make_engine: EngineFactory) -> None:
    plain, checked = make_engine(), make_engine(shadow_rate=1.0)
    for _ in range(2):
        assert run_all(checked, requests(12)) == run_all(plain, requests(12))
        assert counts(checked).num_disagreements == 0
    assert checked.stats() == plain.stats()
    assert checked.draft_health().windows == plain.draft_health().windows
    assert plain.draft_health().shadow is None


def accept_everything(target_tokens: Sequence[int], chains: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """A verify pass that does not look."""
    ends = torch.tensor([len(chain) + 1 for chain in chains]).cumsum(0).tolist()
    return [len(chain) for chain in chains], [target_tokens[end - 1] for end in ends]


def test_a_verify_pass_that_does_not_look_is_counted_and_logged_with_its_position(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = run_all(make_engine(), requests(5))
    engine = make_engine(shadow_rate=1.0)
    monkeypatch.setattr(cycle, "verify_greedy", accept_everything)
    wrong = run_all(engine, requests(5))
    found = counts(engine)
    assert found.num_disagreements > 50
    for rid, tokens in wrong.items():
        position = next(i for i, pair in enumerate(zip(tokens, right[rid], strict=True)) if pair[0] != pair[1])
        start = (
            f"shadow check: request {rid}, output position {position}: emitted token {tokens[position]}, without "
            f"speculation it is {right[rid][position]} (gap "
        )
        assert sum(line.startswith(start) for line in lines(caplog)) == 1, start
    complaint = engine.draft_health().complaint
    assert complaint is not None
    assert complaint.startswith(f"wrong output: {found.num_disagreements} of {found.num_tokens} tokens")


def test_a_sampled_token_that_cannot_be_drawn_is_found(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def accept(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        target_probs, _, draft_tokens, *_ = arguments
        return (draft_tokens >= 0).sum(1), target_probs[:, -1].argmax(-1)

    engine = make_engine(shadow_rate=1.0)
    monkeypatch.setattr(cycle, "verify_sampled", accept)
    run_all(engine, requests(4, temperature=1.0, top_k=4))
    assert counts(engine).num_disagreements > 20
    assert "it would have been at least as likely as" in lines(caplog)[0]


def test_a_wrong_page_in_the_prefix_cache_is_found(make_engine: EngineFactory) -> None:
    """The check recomputes the prompt too: it does not trust what the request was given."""
    engine = make_engine(shadow_rate=1.0)
    prompt = [i % 23 for i in range(100)]
    run_all(engine, [request("first", prompt)])
    assert counts(engine).num_disagreements == 0
    engine._stepper._cycle._kv_cache.v[:4].mul_(-1.0)
    run_all(engine, [request("second", prompt)])
    assert counts(engine).num_disagreements > 0


def test_log_lines_are_few_however_much_is_wrong(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(shadow_rate=1.0)
    monkeypatch.setattr(cycle, "verify_greedy", accept_everything)
    run_all(engine, requests(24))
    assert counts(engine).num_requests == 24
    assert len(lines(caplog)) == shadow.MAX_LINES_PER_MINUTE


def test_the_share_is_kept_and_the_choice_repeats(make_engine: EngineFactory) -> None:
    checked = []
    for _ in range(2):
        engine = make_engine(shadow_rate=0.25)
        for _ in range(10):
            run_all(engine, [request(f"r{i}", [1, 2, 3], 2) for i in range(40)])
            num_requests = counts(engine).num_requests
        checked.append(num_requests)
    assert checked[0] == checked[1]
    assert 60 <= checked[0] <= 140


def test_too_many_at_once_are_left_out_and_counted(make_engine: EngineFactory) -> None:
    engine = make_engine(shadow_rate=1.0, max_running_requests=64)
    run_all(engine, [request(f"r{i}", [1, 2, 3], 4) for i in range(60)])
    found = counts(engine)
    assert (found.num_requests, found.num_skipped) == (shadow.MAX_WAITING, 60 - shadow.MAX_WAITING)


def test_aborted_and_refused_requests_are_not_checked(make_engine: EngineFactory) -> None:
    engine = make_engine(shadow_rate=1.0)
    engine.add(request("a", [1, 2, 3]))
    engine.step()
    engine.abort("a")
    engine.add(request("b", []))
    assert counts(engine) == ShadowCounts()


def test_pages_are_given_back_as_soon_as_a_request_could_need_them(make_engine: EngineFactory) -> None:
    options = {"max_total_tokens": 512, "context_length": 512, "chunked_prefill_size": 64}
    prompt = [i % 23 for i in range(400)]
    plain, engine = make_engine(**options), make_engine(shadow_rate=1.0, **options)
    expected = run_all(plain, [request("long", prompt, 50), request("next", prompt[::-1], 50)])
    assert run_all(engine, [request("long", prompt, 50)]) == {"long": expected["long"]}
    engine.work_in_background()
    held = engine.scheduler.pages.num_pages - engine.scheduler.pages.num_available
    assert held > 0
    assert engine.stats().num_free_pages + engine.stats().num_cached_pages == engine.stats().num_pages
    engine.add(request("next", prompt[::-1], 50))
    said = []
    while engine.has_work:
        said += [token for output in engine.step() for token in output.token_ids]
        engine.work_in_background()
    assert said == expected["next"]
    assert engine.stats().num_preemptions == 0
    assert counts(engine) == ShadowCounts(num_requests=2, num_tokens=100)


def test_while_requests_run_it_takes_a_hundredth_of_the_time(make_engine: EngineFactory) -> None:
    engine = make_engine(shadow_rate=1.0)
    check = engine._shadow
    assert check is not None
    run_all(engine, [request("a", [1] * 300, 30)])
    engine.add(request("b", [1, 2, 3], 400))
    slices = steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        before = check._next_slice_at
        engine.work_in_background()
        slices += check._next_slice_at != before
    assert 1 <= slices <= 1 + steps / 10
    assert counts(engine).num_requests == 2
