"""Outputs between the engine and a response: nothing is lost, doubled or left running, however slowly they are read."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.protocol.messages import RequestOutput, SpecStep, TokenLogprobs
from nextn.server.inbox import Generation


def output(index: int, ids: list[int], total: int, over: bool) -> RequestOutput:
    return RequestOutput(
        rid=str(index),
        token_ids=list(ids),
        prompt_tokens=1,
        completion_tokens=total,
        logprobs=[TokenLogprobs(token_id, -1.0) for token_id in ids],
        prompt_logprobs=[TokenLogprobs(9, None)] if total == len(ids) else None,
        finish_reason="length" if over else None,
        spec_steps=[SpecStep(3, len(ids) - 1, len(ids))],
    )


STEPS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans()))


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, min_tokens=st.integers(1, 6))
def test_what_is_read_is_what_came_whatever_the_timing(
    steps: list[tuple[int, list[int], bool]], min_tokens: int
) -> None:
    """Each step delivers tokens to one choice; its flag says whether the reader looks right after it."""
    released: list[tuple[str, bool]] = []
    generation = Generation(["0", "1", "2"], min_tokens, lambda rid, abort: released.append((rid, abort)))
    sent: dict[int, list[int]] = {0: [], 1: [], 2: []}
    got: dict[int, list[RequestOutput]] = {0: [], 1: [], 2: []}

    async def read() -> None:
        for index, one in await asyncio.wait_for(generation.receive(), 1):
            got[index].append(one)

    async def look() -> None:
        """Read what is due, and otherwise stop waiting, as a client that leaves."""
        reading = asyncio.create_task(generation.receive())
        await asyncio.sleep(0)
        for index, one in reading.result() if reading.done() else ():
            got[index].append(one)
        reading.cancel()

    async def run() -> None:
        for index, ids, looks in steps:
            sent[index] += ids
            generation.deliver(index, output(index, ids, len(sent[index]), over=False))
            if looks:
                await look()
        for index in sent:
            sent[index].append(5)
            generation.deliver(index, output(index, [5], len(sent[index]), over=True))
        while not generation.is_over:
            await read()

    asyncio.run(run())
    for index, outputs in got.items():
        assert [token for one in outputs for token in one.token_ids] == sent[index]
        assert [entry.token_id for one in outputs for entry in one.logprobs or []] == sent[index]
        assert all(sum(step.num_tokens for step in one.spec_steps) == len(one.token_ids) for one in outputs)
        assert sum(len(one.prompt_logprobs or []) for one in outputs) == 1
        assert [one.finish_reason for one in outputs] == [None] * (len(outputs) - 1) + ["length"]
        assert outputs[-1].completion_tokens == len(sent[index])
    assert sorted(released) == [("0", False), ("1", False), ("2", False)]


def test_closing_aborts_what_still_runs_and_only_that() -> None:
    released: list[tuple[str, bool]] = []
    generation = Generation(["0", "1"], 1, lambda rid, abort: released.append((rid, abort)))
    generation.deliver(0, output(0, [1], 1, over=True))
    generation.close()
    generation.close()
    generation.deliver(1, output(1, [1], 1, over=True))
    assert released == [("0", False), ("1", True)]


def test_a_lagging_reader_finds_one_output_per_choice() -> None:
    generation = Generation(["0", "1"], 1, lambda rid, abort: None)
    for step in range(1, 1001):
        for index in (0, 1):
            generation.deliver(index, output(index, [step % 10], step, over=False))
    received = asyncio.run(generation.receive())
    assert [(index, len(one.token_ids), one.completion_tokens) for index, one in received] == [
        (0, 1000, 1000),
        (1, 1000, 1000),
    ]
