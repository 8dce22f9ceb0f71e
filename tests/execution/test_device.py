"""Where the engine computes, in which types, and what it says where it cannot."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.errors import ConfigError
from nextn.execution import shard
from nextn.execution.device import choose_device, computing_dtype, kv_dtype
from nextn.execution.engine import Engine

from tests.conftest import request, run_all
from tests.headers import published_config
from tests.simulated_cuda import SimulatedCuda

CUDA = torch.device("cuda")


def test_without_a_gpu_the_cpu_computes_and_asking_for_one_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"--device: found cuda, but torch .* finds no GPU; install .* --device cpu"):
        choose_device("cuda")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--tp-size: a machine runs 2 ranks or more, but has 1 GPUs"):
        choose_device("auto", local_rank=1)


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, SimulatedCuda(patch):
        assert choose_device("auto").type == "cuda"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
        with pytest.raises(
            ConfigError, match=r"--device: T4 has compute capability 7\.5, expected 8\.0 or higher; use"
        ):
            choose_device("auto")


def test_the_computing_type_is_the_devices(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model_path=str(tiny_checkpoint))
    assert computing_dtype(config, torch.device("cpu")) == torch.float32
    assert computing_dtype(config, CUDA) == torch.bfloat16
    wide = EngineConfig(model_path=str(tiny_checkpoint), dtype="float32")
    with pytest.raises(ConfigError, match="--dtype: found float32, expected bfloat16 or float16 on a GPU"):
        computing_dtype(wide, CUDA)


def test_fp8_keys_and_values_serve_on_a_cpu_too(tiny_checkpoint: Path) -> None:
    """In a quarter of float32's memory, with nearly the same tokens."""
    config = EngineConfig(model_path=str(tiny_checkpoint), kv_cache_dtype="fp8_e4m3", max_running_requests=4)
    assert kv_dtype(config, torch.float32) == torch.float8_e4m3fn
    engine = Engine(config)
    assert engine._cycle._kv_cache.k.dtype == torch.float8_e4m3fn
    plain = Engine(EngineConfig(model_path=str(tiny_checkpoint), max_running_requests=4))
    found, expected = (run_all(one, [request("a", [3, 4, 5, 6], 16)])["a"] for one in (engine, plain))
    assert found[:3] == expected[:3]


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        ("load_model", "--tp-size"),
        ("_measured_plan", "--chunked-prefill-size"),
        ("_decode_runner", "--cuda-graph-max-bs"),
    ],
)
def test_a_gpu_that_is_too_small_is_one_line_with_what_to_change(
    tiny_checkpoint: Path, part: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(shard, part, fail)
    monkeypatch.setattr(shard, "_compile_ahead", lambda *arguments: None)
    if part == "_measured_plan":  # which only a GPU has
        monkeypatch.setattr(shard, "choose_device", lambda *arguments: torch.device("cuda"))
        monkeypatch.setattr(shard, "load_model", lambda config, device, **options: load_on_cpu(config, **options))
    with pytest.raises(ConfigError, match=f"not enough; .*{advice}.*: CUDA out of memory. Tried to allocate 2.00 GiB"):
        Engine(EngineConfig(model_path=str(tiny_checkpoint), page_size=16, decode_on_device=True))


def load_on_cpu(config: EngineConfig, **options: Any) -> LoadedModel:
    return load_model(config, device=torch.device("cpu"), **options)


def test_a_machine_that_is_too_small_says_so_before_it_is_full(tmp_path: Path) -> None:
    """GLM-4.6's 357 billion parameters in float32."""
    (tmp_path / "config.json").write_text(json.dumps(published_config("glm-4.6", "channel")))
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"--device cpu: the weights take 13\d\d\.\d GiB in float32"):
        Engine(EngineConfig(model_path=str(tmp_path), load_format="dummy", device="cpu"))
    assert time.monotonic() - started < 30
