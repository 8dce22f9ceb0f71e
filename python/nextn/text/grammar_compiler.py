"""Compiling grammars, here or in a process of its own.

A few lines can describe a grammar that takes minutes, gigabytes, or more stack than there is. ``GrammarProver``
compiles what a client sends where nothing else can be lost, within a time limit; run as a module, this file is that
process.
"""

from __future__ import annotations

import json
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from nextn.errors import RequestError

SECONDS_TO_COMPILE = 2.0
SECONDS_TO_START = 60.0
MAX_MEMORY = 8 << 30
"""Bytes of address space of the process."""

MAX_COMPLAINT_LEN = 300
NUM_VERDICTS = 256
"""Grammars of which is known whether they are good."""

SECONDS_OF_DISTRUST = 60.0
"""How long a bad one is not tried again; a busy machine may have been the reason."""


class _Question(NamedTuple):
    """What is asked of a grammar: whether it can be compiled, or what it is in Lark. vocab_size, eos_token_ids: of the
    vocabulary that it is for."""

    kind: Literal["compile", "translate"]
    grammar: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class _Verdict(NamedTuple):
    """complaint: what is wrong with a grammar, nothing where it is well; lark: what it was translated to
    until: when it is asked again, as ``time.monotonic``
    """

    complaint: str
    lark: str = ""
    until: float = float("inf")


def read_vocabulary(folder: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer.json of a folder, as grammars need it. Raises OSError or ValueError if it cannot be read."""
    text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def compile_grammar(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning. Raises RequestError where the grammar is wrong, or allows nothing."""
    # What a step may take: an answer that gets there ends with an error.
    limits = LLParserLimits(
        step_lexer_fuel=20_000,
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=100_000,
        verbose_errors=False,
    )
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if not matcher.is_error() and not any(matcher.compute_bitmask()):
        raise RequestError("nothing follows it")
    if matcher.is_error():
        raise RequestError(short_error(matcher))
    return matcher


def short_error(matcher: LLMatcher) -> str:
    """What went wrong, without the state and the grammar that the library adds, nor options that clients have not."""
    complaint = matcher.get_error().partition("<state>")[0].strip()[:MAX_COMPLAINT_LEN]
    if "coerce_one_of" in complaint:
        return "'oneOf' of schemas that one value may match together cannot be enforced; use 'anyOf'"
    return complaint


def to_lark(ebnf: str) -> str:
    """A context-free grammar in llama.cpp's notation (GBNF) or in Lark's, in Lark's. Raises RequestError if it is none.

    What it takes grows with the square of the grammar's length, and more.
    """
    try:
        return any_to_lark(ebnf)
    except Exception as error:  # whatever its parser stumbles over
        raise RequestError(str(error)[:MAX_COMPLAINT_LEN]) from None


class UnknownGrammar(Exception):
    """Whether a grammar is good is not known before it is compiled."""


class GrammarProver:
    """Compiles and translates grammars in a process that may be lost. Started when first asked; threads may share it.

    folder: where the tokenizer.json is
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = str(folder)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._memory = threading.Lock()
        self._verdicts: dict[_Question, _Verdict] = {}  # the latest used are the last

    def check(self, grammar: str, vocab_size: int, eos_token_ids: Sequence[int], *, at_once: bool = False) -> None:
        """Raises RequestError where the engine could not compile the grammar, or not in time.

        at_once: do not wait, but raise UnknownGrammar where the answer is not known
        """
        self._find(_Question("compile", grammar, vocab_size, tuple(eos_token_ids)), at_once)

    def to_lark(self, ebnf: str, vocab_size: int, eos_token_ids: Sequence[int], *, at_once: bool = False) -> str:
        """``to_lark`` of this module. Raises RequestError also where it takes too long. at_once: see ``check``"""
        return self._find(_Question("translate", ebnf, vocab_size, tuple(eos_token_ids)), at_once)

    def _find(self, question: _Question, at_once: bool) -> str:
        verdict = self._known(question)
        if verdict is None and at_once:
            raise UnknownGrammar
        if verdict is None:
            with self._lock:
                verdict = self._known(question)
                if verdict is None:
                    verdict = self._ask(question)
                    self._remember(question, verdict)
        if verdict.complaint:
            raise RequestError(verdict.complaint)
        return verdict.lark

    def _known(self, question: _Question) -> _Verdict | None:
        with self._memory:
            verdict = self._verdicts.pop(question, None)
            if verdict is None or time.monotonic() >= verdict.until:
                return None
            self._verdicts[question] = verdict
            return verdict

    def _remember(self, question: _Question, verdict: _Verdict) -> None:
        if verdict.complaint:
            verdict = verdict._replace(until=time.monotonic() + SECONDS_OF_DISTRUST)
        with self._memory:
            if len(self._verdicts) >= NUM_VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]
            self._verdicts[question] = verdict

    def _ask(self, question: _Question) -> _Verdict:
        process = self._process
        if process is None or process.poll() is not None:
            vocabulary = [self._folder, str(question.vocab_size), *map(str, question.eos_token_ids)]
            command = [sys.executable, "-m", __name__, *vocabulary]
            process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._answer(process, SECONDS_TO_START) is None:
                return _Verdict("the vocabulary cannot be read")
        assert process.stdin is not None, "it is a pipe"
        try:
            process.stdin.write(json.dumps((question.kind, question.grammar)).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return _Verdict("it cannot be compiled")
        verdict = self._answer(process, SECONDS_TO_COMPILE)
        if verdict is None:
            most = f"{SECONDS_TO_COMPILE:g} s, or more memory than there is for it"
            return _Verdict(f"it takes more than {most}, to {question.kind}")
        return verdict

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> _Verdict | None:
        """What the process says; None, and its end, where it says nothing in time."""
        assert process.stdout is not None, "it is a pipe"
        line = process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else b""
        if line:
            return _Verdict(*json.loads(line))
        process.kill()
        process.wait()
        self._process = None
        return None


def _serve(folder: str, vocab_size: str, *eos_token_ids: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends when it is done, and this with it
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    vocabulary = read_vocabulary(folder, int(vocab_size), list(map(int, eos_token_ids)))
    print(json.dumps([""]), flush=True)
    for line in sys.stdin:
        signal.alarm(int(2 * SECONDS_TO_COMPILE))  # should the server be gone meanwhile
        complaint = lark = ""
        kind, grammar = json.loads(line)
        try:
            if kind == "translate":
                lark = to_lark(grammar)
            else:
                compile_grammar(vocabulary, grammar)
        except RequestError as error:
            complaint = str(error)
        signal.alarm(0)
        print(json.dumps([complaint, lark]), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
