"""Ranks on simulated GPUs: their steps are recorded and launched ahead, with all that they exchange."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from nextn.config.engine_config import EngineConfig
from nextn.config.ranks import RankPlace
from nextn.distributed.parallel import abandon
from nextn.execution.engine import Engine
from nextn.execution.rank_process import end_with_parent, joined
from nextn.execution.ranks import places_of_node
from nextn.execution.shard import load_shard
from nextn.protocol.messages import AddRequest

from tests.checkpoints import tiny_config, write_checkpoint
from tests.conftest import request, run_all
from tests.simulated_cuda import SimulatedCuda

CONFIG = tiny_config(
    vocab_size=40,
    num_hidden_layers=1,
    head_dim=32,
    max_position_embeddings=256,
    moe_intermediate_size=64,
    intermediate_size=96,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
REQUESTS = [
    request("greedy", [3, 9, 1, 22], 6),
    request("seeded", [4, 9, 1], 5, temperature=0.9, top_p=0.9, has_own_seed=True, seed=5, presence_penalty=0.4),
]


def follow(config: EngineConfig, place: RankPlace, found: Connection, parent_pid: int) -> None:
    """The process of the second rank. Sends how many recorded steps it has replayed."""
    torch.set_num_threads(1)
    end_with_parent(parent_pid)
    with pytest.MonkeyPatch.context() as patch, SimulatedCuda(patch, place.rank) as mode, joined(config, place) as tp:
        load_shard(config, tp).follow(tp)
        found.send(mode.num_replays)


def run_over(num_ranks: int, folder: Path, requests: list[AddRequest]) -> tuple[dict[str, list[int]], list[int]]:
    """Output tokens by rid, and each rank's number of replayed steps."""
    config = EngineConfig(
        model_path=str(folder / "checkpoint"),
        device="cuda",
        num_draft_steps=1,
        max_running_requests=1,
        page_size=8,
        chunked_prefill_size=8,
        max_total_tokens=128,
        canary="off",
        serves_grammars=False,
    )
    mine, *others = places_of_node(
        num_ranks, nnodes=1, node_rank=0, rendezvous=f"file://{folder}/of_{num_ranks}", timeout=120
    )
    context = multiprocessing.get_context("spawn")
    found, replays = [], []
    for place in others:
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=follow, args=(config, place, sender, os.getpid()), daemon=True).start()
        sender.close()
        found.append(receiver)
    try:
        with pytest.MonkeyPatch.context() as patch, SimulatedCuda(patch) as mode, joined(config, mine) as tp:
            engine = Engine(config, tp)
            outputs = run_all(engine, requests)
            engine.close()
            replays.append(mode.num_replays)
    finally:
        abandon()
    return outputs, replays + [one.recv() for one in found]


def test_two_ranks_replay_the_same_steps_and_say_what_one_says(tmp_path: Path) -> None:
    """Greedy and sampled, the next step always launched before the last is read."""
    pytest.importorskip("triton")
    write_checkpoint(tmp_path / "checkpoint", CONFIG, quant="channel")
    alone, _ = run_over(1, tmp_path, REQUESTS)
    together, replays = run_over(2, tmp_path, REQUESTS)
    assert together == alone
    assert replays[0] == replays[1] > 5
