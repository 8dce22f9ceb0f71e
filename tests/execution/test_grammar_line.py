"""Requests that wait for their grammar hold nobody up, and are forgotten by nobody."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from nextn.config.engine_config import EngineConfig
from nextn.demo import checkpoint_dir
from nextn.execution import engine_process
from nextn.execution.engine import Engine
from nextn.execution.grammar_line import GrammarLine
from nextn.speculative.grammar import NUM_KEPT, Grammars
from nextn.text.grammar import regex_form

from tests.checkpoints import tiny_config, write_checkpoint
from tests.conftest import request

PATTERN = regex_form("[ab]{2,5}!", "regex", str).as_grammar()


def slow_grammar(number: int) -> str:
    """One that takes half a second or more to compile; each number's is another."""
    names = [f"k{number}x{i}" for i in range(4000)]
    properties = {name: {"type": "string", "maxLength": 50, "pattern": f"^[a-z]*{name}[0-9]+$"} for name in names}
    return LLMatcher.grammar_from_json_schema({"type": "object", "properties": properties})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    config = tiny_config(vocab_size=2560, eos_token_id=[2528])
    folder = write_checkpoint(tmp_path_factory.mktemp("line"), config, quant="channel")
    shutil.copy(checkpoint_dir() / "tokenizer.json", folder)
    return Engine(EngineConfig(model_path=str(folder), device="cpu", num_draft_steps=1, canary="off"))


@pytest.fixture
def line(engine: Engine) -> Iterator[GrammarLine]:
    made = GrammarLine(engine)
    yield made
    made.abort(None)
    made.close()
    assert not engine.has_work


def test_steps_go_on_while_a_grammar_is_compiled(engine: Engine, line: GrammarLine) -> None:
    grammar = slow_grammar(0)
    started = time.perf_counter()
    engine.compile_grammar(slow_grammar(1))
    compiling = time.perf_counter() - started
    assert line.add(request("other", [5, 6, 7], 4000)) == []
    assert line.add(request("slow", [5, 6], 3, grammar=grammar, ignore_eos=False)) == []
    assert len(line) == 1
    assert line.stats().num_queued == engine.stats().num_queued + 1
    num_steps, longest, last = 0, 0.0, time.perf_counter()
    while line:
        assert line.admit() == []
        engine.step()
        num_steps += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert num_steps > 10
    assert longest < compiling / 2
    assert "slow" in engine.scheduler


def test_a_grammar_that_takes_no_time_is_there_with_the_next_step(engine: Engine, line: GrammarLine) -> None:
    engine.compile_grammar(PATTERN)
    assert line.add(request("a", [5, 6], 9, grammar=PATTERN, ignore_eos=False)) == []
    assert not line
    assert "a" in engine.scheduler


def test_a_grammar_that_is_known_does_not_wait_for_others(engine: Engine, line: GrammarLine) -> None:
    engine.compile_grammar(PATTERN)
    assert line.add(request("slow", [5, 6], 3, grammar=slow_grammar(5), ignore_eos=False)) == []
    assert line.add(request("known", [5, 6], 9, grammar=PATTERN, ignore_eos=False)) == []
    assert len(line) == 1
    assert "known" in engine.scheduler


def test_what_was_compiled_is_not_compiled_again_however_many_others_were_since(
    engine: Engine, line: GrammarLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    here = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, text: compiled.append(text) or here(self, text))
    grammars = [regex_form(f"[ab]{{2,5}}{number}", "regex", str).as_grammar() for number in range(NUM_KEPT + 5)]
    line.add(request("slow", [5, 6], 3, grammar=slow_grammar(6), ignore_eos=False))
    for number, grammar in enumerate(grammars):
        assert line.add(request(f"r{number}", [5, 6], 9, grammar=grammar, ignore_eos=False)) == []
    while len(compiled) <= len(grammars):
        time.sleep(0.01)
    assert _wait(line) == []
    assert len(compiled) == len(grammars) + 1


def test_a_grammar_that_is_wrong_is_refused_once(line: GrammarLine) -> None:
    (output,) = line.add(request("wrong", [5], 9, grammar="start: (", ignore_eos=False)) or _wait(line)
    assert (output.rid, output.finish_reason, output.error_kind) == ("wrong", "error", "invalid")
    assert "grammar" in (output.error or "")
    assert not line


def test_whoever_waits_can_be_aborted_and_keeps_its_name(engine: Engine, line: GrammarLine) -> None:
    for number, rid in enumerate(("one", "two", "three")):
        assert line.add(request(rid, [5, 6], 3, grammar=slow_grammar(2 + number), ignore_eos=False)) == []
    (refused,) = line.add(request("two", [5], 3))
    assert refused.finish_reason == "error"
    assert "'two' is in use" in (refused.error or "")
    (aborted,) = line.abort("two")
    assert (aborted.rid, aborted.finish_reason) == ("two", "abort")
    assert line.abort("two") == []
    assert sorted(output.rid for output in line.abort(None)) == ["one", "three"]
    assert not line
    assert line.add(request("two", [5], 1)) == []
    assert [output.rid for output in engine.step()] == ["two"]


def test_an_engine_that_fails_compiles_nothing_more(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends only when its threads have: whatever waits would be compiled first."""
    waiting = []

    def fail(_: Engine, line: GrammarLine, *__: object) -> None:
        for number in range(3):
            line.add(request(str(number), [5, 6], 3, grammar=slow_grammar(7 + number), ignore_eos=False))
        waiting.extend(compiled for _, compiled in line._waiting.values())
        raise RuntimeError("a step went wrong")

    monkeypatch.setattr(engine_process, "_serve", fail)
    monkeypatch.setattr(engine_process, "configure_logging", lambda *_: None)  # this process has its own
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    engine_process.run_engine(engine.config, str(tmp_path), os.getppid(), torch.get_num_threads(), "warning")
    assert len(waiting) == 3
    assert [compiled.cancelled() for compiled in waiting[1:]] == [True, True]


def _wait(line: GrammarLine) -> list:  # type: ignore[type-arg]
    outputs = []
    while line:
        outputs += line.admit()
    return outputs
