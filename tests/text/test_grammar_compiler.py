"""Grammars that would take a process down, or never end, are refused, and the next one is served."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from nextn.demo import checkpoint_dir
from nextn.errors import RequestError
from nextn.text import grammar_compiler
from nextn.text.grammar import Form, ebnf_form, json_form, regex_form
from nextn.text.grammar_compiler import GrammarProver, UnknownGrammar

EOS = [2528, 2535]


@pytest.fixture(scope="module")
def prover() -> GrammarProver:
    return GrammarProver(checkpoint_dir())


def _deep(num_rules: int) -> str:
    return "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(num_rules)) + f'a{num_rules}: "x"\n'


def _crossed(num_terms: int) -> str:
    terms = (rf"/(.|\n)*{chr(97 + i)}.{{{10 + i}}}{chr(98 + i)}(.|\n)*/" for i in range(num_terms))
    return "start: A\nA: " + " & ".join(terms)


def test_what_crashes_or_hangs_the_compiler_is_refused_in_time(
    prover: GrammarProver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(grammar: str) -> None:
        prover.check(grammar, 2560, EOS)

    check(regex_form("[ab]+", "regex", str).as_grammar())
    monkeypatch.setattr(grammar_compiler, "SECONDS_TO_COMPILE", 1.0)
    for hostile in (_deep(7000), _crossed(12)):
        started = time.monotonic()
        with pytest.raises(RequestError, match=r"^ebnf: it takes more than 1 s, or more memory"):
            ebnf_form(hostile, "ebnf", check)
        assert time.monotonic() - started < 10
        json_form({"type": "object"}, "schema", check)
    with pytest.raises(RequestError):
        json_form({"type": "integer", "multipleOf": 999983}, "schema", check)


def test_what_was_refused_is_refused_again_without_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(checkpoint_dir() / "tokenizer.json", tmp_path)
    prover = GrammarProver(tmp_path)
    bad, wrong = (Form({"lark_grammar": lark}).as_grammar() for lark in (_deep(7000), "start: other"))
    monkeypatch.setattr(grammar_compiler, "SECONDS_OF_DISTRUST", 0.0)
    with pytest.raises(RequestError):
        prover.check(wrong, 2560, EOS)
    for grammar in (bad, wrong):
        with pytest.raises(UnknownGrammar):
            prover.check(grammar, 2560, EOS, at_once=True)
    monkeypatch.setattr(grammar_compiler, "SECONDS_OF_DISTRUST", 1000.0)
    with pytest.raises(RequestError) as first:
        prover.check(bad, 2560, EOS)
    (tmp_path / "tokenizer.json").unlink()  # no process can start any more
    for at_once in (False, True):
        with pytest.raises(RequestError, match=re.escape(str(first.value))):
            prover.check(bad, 2560, EOS, at_once=at_once)


@pytest.mark.parametrize(
    "hostile",
    [
        "root ::= \n" + 60_000 * "\n",
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(6000)) + 'r6000 ::= "x"',
    ],
    ids=["empty lines", "rules in a row"],
)
def test_what_is_translated_for_too_long_is_refused_in_time(
    prover: GrammarProver, monkeypatch: pytest.MonkeyPatch, hostile: str
) -> None:
    assert "start" in prover.to_lark('root ::= "a"', 2560, EOS)
    monkeypatch.setattr(grammar_compiler, "SECONDS_TO_COMPILE", 1.0)
    started = time.monotonic()
    for at_once in (False, True):
        with pytest.raises(RequestError, match=r"^it takes more than 1 s, .*, to translate$"):
            prover.to_lark(hostile, 2560, EOS, at_once=at_once)
    assert time.monotonic() - started < 10
    lark = prover.to_lark('root ::= "a"', 2560, EOS, at_once=True)
    assert ebnf_form(lark, "ebnf", lambda grammar: prover.check(grammar, 2560, EOS), str)


def test_a_grammar_that_is_in_use_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "NUM_VERDICTS", 2)
    prover = GrammarProver(checkpoint_dir())
    used, *others = (regex_form(pattern, "regex", str).as_grammar() for pattern in ("used", "a", "b"))
    prover.check(used, 2560, EOS)
    for grammar in others:
        prover.check(grammar, 2560, EOS)
        prover.check(used, 2560, EOS, at_once=True)
    with pytest.raises(UnknownGrammar):
        prover.check(others[0], 2560, EOS, at_once=True)


@pytest.mark.parametrize("nothing", ["root ::= root", "start: s\ns: s"])
def test_what_allows_nothing_is_refused(prover: GrammarProver, nothing: str) -> None:
    with pytest.raises(RequestError):
        ebnf_form(nothing, "ebnf", lambda grammar: prover.check(grammar, 2560, EOS))


def test_threads_share_the_process(prover: GrammarProver) -> None:
    failed: list[str] = []

    def ask(i: int) -> None:
        try:
            prover.check(regex_form(f"[ab]{{{i}}}", "regex", str).as_grammar(), 2560, EOS)
        except RequestError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_vocabulary_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        GrammarProver(tmp_path).check("start: /a/", 2560, EOS)
