"""Ranks as processes of a real server, of two nodes on this machine, and beside a program of the user's."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nextn.errors import ConfigError, PeerLost
from nextn.llm import LLM, SamplingParams

from tests.checkpoints import tiny_config, write_checkpoint
from tests.server.conftest import wait_until
from tests.server.processes import Launched, free_port, launched

MODULE = "nextn.launch_server"
SMALL = ("--max-total-tokens", "8192", "--num-threads", "1", "--served-model-name", "demo", "--tp-size", "2")
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
def two_nodes() -> Iterator[tuple[Launched, Launched]]:
    flags = (*SMALL, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}")
    with launched(*flags, module=MODULE) as first, launched(*flags, "--node-rank", "1", module=MODULE) as second:
        first.wait_ready(60)
        yield first, second


@pytest.fixture(scope="module")
def one_rank() -> list[int]:
    """What the embedded model answers on one rank."""
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    with LLM(max_total_tokens=8192, num_threads=1) as llm:
        return llm.generate(PROMPT, params)[0].output_ids


def test_two_ranks_serve_and_a_killed_one_ends_the_server_with_its_name(one_rank: list[int]) -> None:
    with launched(*SMALL, module=MODULE) as server:
        server.wait_ready(60)
        assert answer(server)["output_ids"] == one_rank
        assert server.http.get("/get_server_info").json()["tp_size"] == 2
        _, second = rank_pids(server)
        started = time.monotonic()
        os.kill(second, signal.SIGKILL)
        assert server.wait() == 1
        assert time.monotonic() - started < 5
        assert server.err[-1] == f"nextn: error: rank 1 of 2 (pid {second}) was killed by SIGKILL\n"


def test_two_nodes_serve_and_end_together_in_good_order(one_rank: list[int]) -> None:
    with two_nodes() as (first, second):
        assert answer(first)["output_ids"] == one_rank
        first.signal(signal.SIGTERM)
        assert (first.wait(), second.wait()) == (0, 0)


def test_the_loss_of_a_node_ends_the_other_and_the_server() -> None:
    with two_nodes() as (first, second):
        second.signal(signal.SIGKILL)
        assert first.wait() == 1
        assert "rank 0 of 2" in first.err[-1]
        assert "lost the ranks of another node" in first.err[-1]


def test_the_death_of_the_server_ends_every_node(folder: Path) -> None:
    with two_nodes() as (first, second):
        first.process.kill()
        wait_until(lambda: not first.children(), 10)
        assert second.wait() == 1
        assert "rank 1 of 2" in second.err[-1]


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


def test_a_program_cannot_span_nodes() -> None:
    with pytest.raises(ConfigError, match="nnodes: found 2, expected 1"):
        LLM(tp_size=2, nnodes=2, dist_init_addr="127.0.0.1:1")
