"""Order, budget, prefix reuse, preemption and eviction, step by step."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Decision, Scheduler, SchedulerConfig
from nextn.scheduler.sequence import Sequence


def make_scheduler(num_pages: int = 64, page_size: int = 4, **overrides: Any) -> Scheduler:
    values: dict[str, Any] = {
        "max_running": 8,
        "max_queued": 16,
        "max_prefill_tokens": 0,
        "context_length": num_pages * page_size - 1,
        "num_drafts": 0,
        "by_priority": False,
        "eos_token_ids": (99,),
    }
    return Scheduler(SchedulerConfig(**{**values, **overrides}), KVPages(num_pages, page_size))


def add(scheduler: Scheduler, rid: str, prompt: list[int], max_new: int = 4, **fields: Any) -> Sequence:
    sampling = TokenSampling(max_new_tokens=max_new, seed=0)
    return scheduler.add(AddRequest(rid=rid, input_ids=prompt, sampling=sampling, **fields))


def step(scheduler: Scheduler, token: int = 1) -> dict[str, int]:
    """Run one step that decides ``token`` everywhere; returns how many known tokens each request computed."""
    computed = {}
    for extend in scheduler.schedule():
        computed[extend.seq.request.rid] = extend.num_tokens
        tokens = [token] * (extend.num_drafts + 1) if extend.decides else []
        scheduler.commit(extend, Decision(tokens, extend.num_drafts))
        scheduler.check()
    return computed


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    scheduler = make_scheduler(max_prefill_tokens=8)
    add(scheduler, "a", [1, 2, 3], max_new=10)
    assert step(scheduler) == {"a": 3}
    add(scheduler, "b", list(range(20)))
    assert step(scheduler) == {"a": 1, "b": 8}
    assert step(scheduler) == {"a": 1, "b": 8}
    assert step(scheduler) == {"a": 1, "b": 4}
    assert step(scheduler) == {"a": 1, "b": 1}


def test_first_come_is_first_served_and_priority_overtakes() -> None:
    for by_priority, expected in ((False, ["a", "b"]), (True, ["b", "a"])):
        scheduler = make_scheduler(max_running=1, by_priority=by_priority)
        add(scheduler, "a", [1], max_new=1, priority=0)
        add(scheduler, "b", [2], max_new=1, priority=5)
        assert [*step(scheduler), *step(scheduler)] == expected


@pytest.mark.parametrize("by_priority", [False, True])
def test_a_request_that_ranks_first_does_not_wait_for_the_chunks_of_a_long_prompt(by_priority: bool) -> None:
    scheduler = make_scheduler(max_prefill_tokens=8, by_priority=by_priority)
    add(scheduler, "long", list(range(40)), priority=0)
    assert step(scheduler) == {"long": 8}
    add(scheduler, "short", [1, 2, 3], priority=5)
    assert step(scheduler) == ({"short": 3, "long": 5} if by_priority else {"long": 8})


def test_a_request_for_which_there_is_no_memory_is_not_tried_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(num_pages=10)
    add(scheduler, "a", list(range(20)), max_new=12)
    step(scheduler)
    tried: list[str] = []
    attach = scheduler.pages.attach_prefix
    monkeypatch.setattr(
        scheduler.pages, "attach_prefix", lambda seq, most: tried.append(seq.request.rid) or attach(seq, most)
    )
    add(scheduler, "b", list(range(100, 120)))
    assert scheduler.may_admit
    while "a" in scheduler:
        step(scheduler)
        assert tried == ["b"]
        assert scheduler.may_admit == ("a" not in scheduler)
    assert step(scheduler) == {"b": 20}


def test_a_prefix_that_others_compute_meanwhile_lets_a_request_in() -> None:
    scheduler = make_scheduler(num_pages=12, max_prefill_tokens=8)
    add(scheduler, "a", list(range(32)), max_new=8)
    step(scheduler)
    add(scheduler, "b", [*range(28), 50, 51], max_new=1)
    while not scheduler.num_decoding:
        step(scheduler)
    assert step(scheduler) == {"a": 1, "b": 2}


def test_a_prefix_that_others_take_hold_of_leaves_its_place_to_the_rest_of_a_request() -> None:
    scheduler = make_scheduler(num_pages=8)
    add(scheduler, "before", list(range(12)), max_new=1)
    step(scheduler)
    add(scheduler, "all of it", list(range(15)), max_new=9, prompt_logprobs_start=0)  # which is why it is computed
    add(scheduler, "waiting", [*range(12), *range(80, 90)], max_new=1)
    assert step(scheduler) == {"all of it": 15}
    assert step(scheduler) == {"all of it": 1, "waiting": 10}


def test_places_to_run_and_to_wait_are_all_taken_before_requests_are_refused() -> None:
    scheduler = make_scheduler(max_running=2, max_queued=3)
    for rid in "abcde":
        assert not scheduler.is_full
        add(scheduler, rid, [1])
    assert scheduler.is_full
    step(scheduler)
    assert scheduler.is_full
    scheduler.abort("a")
    assert not scheduler.is_full


def test_a_second_request_computes_only_what_the_first_did_not() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(10)), max_new=1)
    step(scheduler)
    second = add(scheduler, "b", [*range(10), 50, 51], max_new=1)
    assert step(scheduler) == {"b": 4}
    assert second.cached_tokens == 8


def test_a_whole_cached_prompt_still_computes_its_last_page() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(8)), max_new=3)
    while scheduler.has_work:
        step(scheduler)
    add(scheduler, "b", list(range(8)), max_new=1)
    assert step(scheduler) == {"b": 4}


def test_requests_share_while_the_first_still_runs() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, "a", list(range(12)), max_new=10)
    step(scheduler)
    second = add(scheduler, "b", list(range(12)), max_new=10)
    step(scheduler)
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2] or second.cached_tokens == 8


def test_a_cache_salt_keeps_prefixes_apart() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(8)), max_new=1, cache_salt="alice")
    step(scheduler)
    other = add(scheduler, "b", list(range(8)), max_new=1, cache_salt="bob")
    step(scheduler)
    same = add(scheduler, "c", list(range(8)), max_new=1, cache_salt="alice")
    step(scheduler)
    assert (other.cached_tokens, same.cached_tokens) == (0, 4)


@pytest.mark.parametrize("salts", [1, 10_000], ids=["one prefix again and again", "a salt for each"])
def test_the_cache_does_not_grow_beyond_its_pages(salts: int) -> None:
    scheduler = make_scheduler(num_pages=16)
    sizes = []
    for i in range(3000):
        add(scheduler, "a", list(range(8)), max_new=1, cache_salt=str(i % salts))
        step(scheduler)
        if i % 1000 == 999:
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert max(sizes) - min(sizes) < 300


def test_generated_tokens_become_a_prefix_for_the_next_turn() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, "a", [1, 2, 3, 4], max_new=6)
    while scheduler.has_work:
        step(scheduler)
    second = add(scheduler, "b", [*first.tokens, 5, 6], max_new=1)
    step(scheduler)
    assert second.cached_tokens == 8  # 9 of the first turn's 10 tokens were computed: two full pages


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    scheduler = make_scheduler(num_pages=7)
    for rid, first in (("old", 10), ("new", 20)):
        add(scheduler, rid, [first] * 8, max_new=1)
        step(scheduler)
    add(scheduler, "touch", [10] * 8, max_new=1)
    step(scheduler)
    add(scheduler, "big", [30] * 15, max_new=1)
    step(scheduler)
    kept = add(scheduler, "again", [10] * 8, max_new=1)
    step(scheduler)
    assert kept.cached_tokens == 4


def test_memory_pressure_preempts_the_last_and_it_resumes_where_it_left() -> None:
    scheduler = make_scheduler(num_pages=6)
    first = add(scheduler, "a", [1] * 7, max_new=12)
    second = add(scheduler, "b", [2] * 7, max_new=12)
    tokens_at_preemption = 0
    while scheduler.has_work:
        before = scheduler.num_preemptions
        step(scheduler)
        if scheduler.num_preemptions > before:
            tokens_at_preemption = len(second.tokens)
    assert scheduler.num_preemptions == 1
    assert 7 < tokens_at_preemption < 19
    assert first.tokens == [1] * 19
    assert second.tokens == [2] * 7 + [1] * 12
    assert first.finish_reason == second.finish_reason == "length"


def test_a_resumed_request_is_computed_up_to_its_last_token_then_drafts_again() -> None:
    scheduler = make_scheduler(num_pages=6, num_drafts=2)
    add(scheduler, "a", [1] * 7, max_new=12)
    victim = add(scheduler, "b", [2] * 7, max_new=12)
    while not scheduler.num_preemptions:
        step(scheduler)
    while victim.status.value == "waiting":
        step(scheduler)
    assert victim.num_computed == len(victim.tokens) - 1
    (extend,) = scheduler.schedule()
    assert (extend.num_tokens, extend.num_drafts) == (1, 2)


def test_drafts_never_pass_the_token_limit() -> None:
    scheduler = make_scheduler(num_drafts=5)
    seq = add(scheduler, "a", [1, 2], max_new=4)
    step(scheduler)
    (extend,) = scheduler.schedule()
    assert extend.num_drafts == 2  # one token is there, two drafts and one more reach the limit of 4
    scheduler.commit(extend, Decision([1, 1, 1], 2))
    assert (seq.num_output, seq.finish_reason) == (4, "length")


@pytest.mark.parametrize(("min_new", "expected"), [(0, [99]), (2, [99, 99, 99])])
def test_a_stop_token_ends_the_request_once_the_minimum_is_reached(min_new: int, expected: list[int]) -> None:
    scheduler = make_scheduler()
    sampling = TokenSampling(max_new_tokens=8, seed=0, min_new_tokens=min_new)
    seq = scheduler.add(AddRequest(rid="a", input_ids=[1], sampling=sampling))
    while scheduler.has_work:
        step(scheduler, token=99)
    assert seq.tokens[1:] == expected
    assert (seq.finish_reason, seq.stop_token_id) == ("stop", 99)


def test_tokens_after_a_stop_in_one_step_are_dropped() -> None:
    scheduler = make_scheduler(num_drafts=3)
    seq = add(scheduler, "a", [1], max_new=20)
    step(scheduler)
    (extend,) = scheduler.schedule()
    kept = scheduler.commit(extend, Decision([5, 99, 6, 7], 3))
    assert kept == [5, 99]
    assert seq.tokens == [1, 1, 5, 99]
    assert scheduler.pages.num_available == 64
