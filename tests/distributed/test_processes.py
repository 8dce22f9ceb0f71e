"""Ranks as processes of a real server, of two nodes on this machine, and beside a program of the user's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import TensorParallel, leave
from nextn.errors import ConfigError, PeerLost
from nextn.execution import rank_process, ranks_beside
from nextn.execution.engine import Engine
from nextn.execution.step import Stepper
from nextn.llm import LLM, SamplingParams

from tests.checkpoints import tiny_config, write_checkpoint
from tests.server.conftest import wait_until
from tests.server.processes import Launched, free_port, launched

MODULE = "nextn.launch_server"
SMALL = ("--max-total-tokens", "8192", "--num-threads", "1", "--served-model-name", "demo", "--tp-size", "2")
HOST = socket.gethostname()
PROMPT = "What is the capital of France?"


def answer(server: Launched) -> dict[str, Any]:
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}}
    found: dict[str, Any] = server.http.post("/generate", json=body).json()
    return found


def rank_pids(server: Launched) -> list[int]:
    """Of its ranks, in order."""
    pids = [pid for pid in server.children() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    return sorted(pids)


@contextlib.contextmanager
def two_nodes(*more: str) -> Iterator[tuple[Launched, Launched]]:
    flags = (*SMALL, *more, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}")
    with launched(*flags, module=MODULE) as first, launched(*flags, "--node-rank", "1", module=MODULE) as second:
        first.wait_ready(60)
        yield first, second


@pytest.fixture(scope="module")
def one_rank() -> list[int]:
    """What the embedded model answers on one rank."""
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    with LLM(max_total_tokens=8192, num_threads=1) as llm:
        return llm.generate(PROMPT, params)[0].output_ids


class Streamed:
    """A request whose first tokens are there."""

    def __init__(self, server: Launched, num_tokens: int) -> None:
        self._server = server
        self._num_tokens = num_tokens
        self._events: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: len(self._events) > 2, 20)

    def _run(self) -> None:
        sampling = {"temperature": 0, "max_new_tokens": self._num_tokens, "ignore_eos": True}
        body = {"text": PROMPT, "stream": True, "sampling_params": sampling}
        with self._server.http.stream("POST", "/generate", json=body) as response:
            self._events.extend(line for line in response.iter_lines() if line)

    def last_event(self) -> str:
        """But [DONE]."""
        self._thread.join(1)
        return self._events[-2]


class Endless(Streamed):
    """A request that only a failure ends before its 4000 tokens."""

    def __init__(self, server: Launched) -> None:
        super().__init__(server, 4000)

    def fails_within(self, seconds: float) -> str:
        """Checks that the server fails, and this request with it. Returns the server's last line."""
        started = time.monotonic()
        assert self._server.wait() == 1
        self._thread.join(1)
        assert time.monotonic() - started < seconds
        assert "The engine has stopped: " in self._events[-1]
        return self._server.err[-1]


@pytest.mark.parametrize("lost", [0, 1])
def test_two_ranks_serve_and_a_killed_one_ends_the_server_with_its_name(one_rank: list[int], lost: int) -> None:
    with launched(*SMALL, module=MODULE) as server:
        server.wait_ready(60)
        assert answer(server)["output_ids"] == one_rank
        assert server.http.get("/get_server_info").json()["tp_size"] == 2
        running, pid = Endless(server), rank_pids(server)[lost]
        os.kill(pid, signal.SIGKILL)
        assert running.fails_within(5) == f"nextn: error: rank {lost} of 2 (pid {pid}) was killed by SIGKILL\n"


def test_two_nodes_serve_and_end_together_in_good_order(one_rank: list[int]) -> None:
    with two_nodes() as (first, second):
        assert answer(first)["output_ids"] == one_rank
        first.signal(signal.SIGTERM)
        assert (first.wait(), second.wait()) == (0, 0)


def test_nodes_that_are_asked_to_stop_together_finish_what_runs() -> None:
    """As Kubernetes, Slurm and systemd ask; the one that is not the first may be asked first."""
    with two_nodes("--shutdown-timeout", "60") as (first, second):
        running = Streamed(first, 300)
        second.signal(signal.SIGTERM)
        time.sleep(0.5)
        first.signal(signal.SIGTERM)
        assert (first.wait(70), second.wait()) == (0, 0)
        assert '"finish_reason":{"type":"length"' in running.last_event()


def test_a_node_that_alone_is_asked_to_stop_ends_all_in_the_end() -> None:
    with two_nodes("--shutdown-timeout", "0") as (first, second):
        second.signal(signal.SIGTERM)
        assert second.wait() == 0
        assert first.wait() == 1
        assert first.err[-1] == f"nextn: error: node 1 ({HOST}): it was stopped\n"


def test_a_killed_rank_ends_every_node_also_where_a_rank_waits_for_it_and_sees_nothing() -> None:
    """As on GPUs, where a kernel waits for the lost rank. Here rank 0 is stopped, and so does not see it either."""
    with two_nodes() as (first, second):
        running = Endless(first)
        (waiting,), (lost,) = rank_pids(first), rank_pids(second)
        os.kill(waiting, signal.SIGSTOP)
        os.kill(lost, signal.SIGKILL)
        reason = f"rank 1 of 2 (pid {lost}) was killed by SIGKILL\n"
        assert running.fails_within(4) == f"nextn: error: node 1 ({HOST}): {reason}"
        assert second.wait() == 1
        assert second.err[-1] == f"nextn: error: {reason}"


def test_the_first_rank_killed_ends_every_node_with_its_name() -> None:
    with two_nodes() as (first, second):
        running, (lost,) = Endless(first), rank_pids(first)
        os.kill(lost, signal.SIGKILL)
        reason = f"rank 0 of 2 (pid {lost}) was killed by SIGKILL\n"
        assert running.fails_within(4) == f"nextn: error: {reason}"
        assert second.wait() == 1
        assert second.err[-1] == f"nextn: error: node 0 ({HOST}): {reason}"


def test_a_rank_that_is_stopped_for_long_ends_every_node() -> None:
    with two_nodes() as (first, second):
        running, (stopped,) = Endless(first), rank_pids(second)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(stopped, signal.SIGCONT)
        time.sleep(0.5)
        assert first.http.get("/health").status_code == 200
        os.kill(stopped, signal.SIGSTOP)
        reason = f"rank 1 of 2 (pid {stopped}) was stopped by SIGSTOP for more than 5 s\n"
        assert running.fails_within(9) == f"nextn: error: node 1 ({HOST}): {reason}"
        assert second.wait() == 1


def test_the_loss_of_a_node_ends_the_other_and_the_server() -> None:
    with two_nodes() as (first, second):
        running = Endless(first)
        second.signal(signal.SIGKILL)
        assert f"node 1 ({HOST}) is gone" in running.fails_within(4)


def test_the_death_of_the_server_ends_every_node() -> None:
    with two_nodes() as (first, second):
        first.process.kill()
        wait_until(lambda: not first.children(), 10)
        assert second.wait() == 1
        assert f"node 0 ({HOST}) is gone" in second.err[-1]


def test_a_model_that_cannot_be_cut_ends_the_server_with_one_line(folder: Path) -> None:
    write_checkpoint(folder, tiny_config(num_attention_heads=3, num_key_value_heads=1))
    flags = ("--model-path", str(folder), "--skip-tokenizer-init", *SMALL)
    with launched(*flags, module=MODULE) as server:
        assert server.wait(60) == 1
        assert server.err[-1] == "nextn: error: --tp-size 2: 3 heads do not divide by 2; choose one of 1, 3\n"


def test_a_program_can_have_ranks_beside_it_and_is_told_which_one_it_lost(one_rank: list[int]) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    with LLM(max_total_tokens=8192, num_threads=1, tp_size=2, log_level="warning") as llm:
        assert llm.generate(PROMPT, params)[0].output_ids == one_rank
        assert llm._ranks is not None
        (pid,) = llm._ranks.pids
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerLost, match=rf"rank 1 of 2 \(pid {pid}\) was killed by SIGKILL"):
            llm.generate(PROMPT, params)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[TensorParallel]:
    """Groups that were left in good order."""
    found: list[TensorParallel] = []

    def watched(tp: TensorParallel) -> None:
        found.append(tp)
        leave(tp)

    monkeypatch.setattr(rank_process, "leave", watched)
    return found


def test_a_group_that_lost_a_rank_is_not_left_and_its_recordings_are_dropped_at_once(
    left: list[TensorParallel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To leave it, or to wait for the step under way, would be to wait for the lost rank."""
    waits: list[bool] = []
    monkeypatch.setattr(Stepper, "forget", lambda self, *, is_waited_for=True: waits.append(is_waited_for))
    for is_lost in (False, True):
        with LLM(max_total_tokens=8192, num_threads=1, tp_size=2, log_level="warning") as llm:
            assert llm._ranks is not None
            (pid,) = llm._ranks.pids
            assert pid is not None
            if is_lost:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda ranks=llm._ranks: ranks._loss is not None)  # type: ignore[misc]
        assert not torch.distributed.is_initialized()
    assert waits == [True, False]
    assert len(left) == 1


def test_a_group_whose_engine_does_not_start_is_not_left(
    left: list[TensorParallel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: EngineConfig, tp: TensorParallel) -> Engine:
        raise ConfigError("it cannot")

    monkeypatch.setattr(ranks_beside, "Engine", refuse)
    with pytest.raises(ConfigError, match="it cannot"):
        LLM(max_total_tokens=8192, num_threads=1, tp_size=2, log_level="error")
    assert not torch.distributed.is_initialized()
    assert not left


UNCLOSED = """
import atexit
from nextn.llm import LLM

if __name__ == "__main__":
    atexit.register(lambda: print(llm._ranks._processes.have_ended_well))
    llm = LLM(max_total_tokens=8192, num_threads=1, tp_size=2, log_level="warning")
"""


def test_a_program_that_ends_ends_the_other_ranks_in_good_order(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UNCLOSED)
    program = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=120)
    assert (program.returncode, program.stdout) == (0, "True\n"), program.stderr


PROGRAM = """
import os, signal, sys, time
from nextn.execution import ranks_beside
from nextn.llm import LLM

ranks_beside.LEAVING_LIMIT = 2.0
if __name__ == "__main__":
    llm = LLM(max_total_tokens=8192, num_threads=1, tp_size=2, log_level="warning")
    (pid,) = llm._ranks.pids
    def step():
        os.kill(pid, signal.SIGKILL)
        time.sleep(60)
    llm.engine.step = step
    llm.engine.close = lambda: time.sleep(60)
    print(pid, flush=True)
    if sys.argv[1] == "step":
        llm.generate("Where?")
"""


@pytest.mark.parametrize("held_up", ["step", "close"])
def test_a_program_that_waits_for_a_rank_on_a_gpu_is_ended(tmp_path: Path, held_up: str) -> None:
    """Such a wait cannot be interrupted. Here it is a sleep."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", held_up]
    program = subprocess.run(command, capture_output=True, text=True, timeout=45)
    reason = {
        "step": f"rank 1 of 2 (pid {program.stdout.strip()}) was killed by SIGKILL",
        "close": "the ranks did not leave each other within 2 s",
    }[held_up]
    assert program.returncode == 1, program.stderr
    assert program.stderr.splitlines()[-1] == f"nextn: error: {reason}, and this process waits for it"


def test_a_program_is_told_of_a_rank_that_is_stopped_for_long() -> None:
    with LLM(max_total_tokens=8192, num_threads=1, tp_size=2, log_level="warning") as llm:
        assert llm._ranks is not None
        (pid,) = llm._ranks.pids
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(PeerLost, match=rf"rank 1 of 2 \(pid {pid}\) was stopped by SIGSTOP for more than 5 s"):
            llm.generate(PROMPT)


def test_a_program_cannot_span_nodes() -> None:
    with pytest.raises(ConfigError, match="nnodes: found 2, expected 1"):
        LLM(tp_size=2, nnodes=2, dist_init_addr="127.0.0.1:1")
