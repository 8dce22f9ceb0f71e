"""A section in a process of its own, so that one that fails, hangs or breaks the card's context stops no other."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import IO

from benchmarks.gpu.place import OutOfTimeError, Place
from benchmarks.gpu.row import Failure, Outcome

GRACE = 5.0
"""Seconds beyond its deadline that a section has to say that it is out of time."""

Section = Callable[[Place], Iterator[Outcome]]


def run_isolated(name: str, section: Section, place: Place) -> Iterator[Outcome]:
    """What the section says, as it says it. It ends at its deadline, with all processes that it started.

    The process is forked, which spares imports; so this one must never touch the card.
    """
    with tempfile.TemporaryFile("w+") as stacks:
        yield from _outcomes_of_process(name, section, place, stacks)


def _outcomes_of_process(name: str, section: Section, place: Place, stacks: IO[str]) -> Iterator[Outcome]:
    """stacks: where the process writes what it does when it crashes, and shortly before it is stopped"""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(section, place, sender, stacks))
    process.start()
    sender.close()
    try:
        while True:
            left = place.deadline + GRACE - time.monotonic()
            if not receiver.poll(max(left, 0)):
                yield Failure(name, "did not end in its time, and was stopped", _read(stacks))
                return
            try:
                outcome = receiver.recv()
            except EOFError:
                break
            if outcome is None:
                return
            yield outcome
        process.join(GRACE)
        yield Failure(name, f"its process ended early, with exit code {process.exitcode}", _read(stacks))
    finally:
        with contextlib.suppress(ProcessLookupError):
            assert process.pid is not None, "it was started"
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _read(stacks: IO[str]) -> str:
    stacks.seek(0)
    return stacks.read()


def _run(section: Section, place: Place, sender: Connection, stacks: IO[str]) -> None:
    os.setpgrp()  # so that whatever the section starts can be ended with it, and all with the session
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(max(place.deadline + GRACE / 2 - time.monotonic(), GRACE / 2), file=stacks)
    for outcome in run_here("section", section, place):
        sender.send(outcome)
    sender.send(None)


def run_here(name: str, section: Section, place: Place) -> Iterator[Outcome]:
    """What the section says; if it fails, its error is the last of it."""
    try:
        yield from section(place)
    except OutOfTimeError as error:
        yield Failure(name, str(error))
    except Exception as error:
        yield Failure(name, f"{type(error).__name__}: {error}", traceback.format_exc())
