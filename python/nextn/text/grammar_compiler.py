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

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

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


_Question = tuple[str, int, tuple[int, ...]]
"""A grammar, and the vocabulary's size and end tokens."""


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


class UnknownGrammar(Exception):
    """Whether a grammar is good is not known before it is compiled."""


class GrammarProver:
    """Compiles grammars in a process that may be lost. Started when first asked; threads may share it.

    folder: where the tokenizer.json is
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = str(folder)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: dict[_Question, tuple[str, float]] = {}  # what is wrong, and until when that is held to be so

    def check(self, grammar: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raises RequestError where the engine could not compile the grammar, or not in time."""
        question = (grammar, vocab_size, tuple(eos_token_ids))
        with self._lock:
            complaint = self._known(question)
            if complaint is None:
                complaint = self._ask(grammar, [self._folder, str(vocab_size), *map(str, eos_token_ids)])
                self._remember(question, complaint)
        if complaint:
            raise RequestError(complaint)

    def recall(self, grammar: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``check`` where the answer is known, at once. Raises UnknownGrammar where it is not."""
        complaint = self._known((grammar, vocab_size, tuple(eos_token_ids)))
        if complaint is None:
            raise UnknownGrammar
        if complaint:
            raise RequestError(complaint)

    def _known(self, question: _Question) -> str | None:
        """What is wrong with a grammar that was asked about, nothing where it is well; None where it was not asked."""
        complaint, until = self._verdicts.get(question, ("", 0.0))
        return complaint if time.monotonic() < until else None

    def _remember(self, question: _Question, complaint: str) -> None:
        self._verdicts.pop(question, None)
        if len(self._verdicts) >= NUM_VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]
        until = time.monotonic() + SECONDS_OF_DISTRUST if complaint else float("inf")
        self._verdicts[question] = (complaint, until)

    def _ask(self, grammar: str, vocabulary: list[str]) -> str:
        """What is wrong with a grammar; nothing where it is well."""
        process = self._process
        if process is None or process.poll() is not None:
            command = [sys.executable, "-m", __name__, *vocabulary]
            process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._answer(process, SECONDS_TO_START) is None:
                return "the vocabulary cannot be read"
        assert process.stdin is not None, "it is a pipe"
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return "it cannot be compiled"
        complaint = self._answer(process, SECONDS_TO_COMPILE)
        if complaint is None:
            return f"it takes more than {SECONDS_TO_COMPILE:g} s, or more memory than there is for it, to compile"
        return complaint

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> str | None:
        """What the process says; None, and its end, where it says nothing in time."""
        assert process.stdout is not None, "it is a pipe"
        line = process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else b""
        if line:
            return str(json.loads(line))
        process.kill()
        process.wait()
        self._process = None
        return None


def _serve(folder: str, vocab_size: str, *eos_token_ids: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends when it is done, and this with it
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    vocabulary = read_vocabulary(folder, int(vocab_size), list(map(int, eos_token_ids)))
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        signal.alarm(int(2 * SECONDS_TO_COMPILE))  # should the server be gone meanwhile
        complaint = ""
        try:
            compile_grammar(vocabulary, json.loads(line))
        except RequestError as error:
            complaint = str(error)
        signal.alarm(0)
        print(json.dumps(complaint), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
