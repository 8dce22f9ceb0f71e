"""Which device computes, and in which types."""

from __future__ import annotations

import torch

from nextn.config.engine_config import EngineConfig
from nextn.errors import ConfigError
from nextn.kernels import gpu

LEAST_CAPABILITY = (8, 0)
"""Of the oldest cards that compute in bfloat16, for which the kernels are compiled in the tests."""

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Where a rank computes.

    name: "cpu", "cuda", or "auto" for a GPU where torch finds one; local_rank: the rank's place on its machine
    Raises ConfigError if there is no such GPU, or it is too old.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device: found cuda, but torch {torch.__version__} finds no GPU; install torch's CUDA build and a "
            "driver for it, or use --device cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"--tp-size: a machine runs {local_rank + 1} ranks or more, but has {torch.cuda.device_count()} GPUs; "
            "lower it, or spread the ranks over more machines with --nnodes"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise ConfigError(
            f"--device: {torch.cuda.get_device_name(device)} has compute capability {_version(capability)}, expected "
            f"{_version(LEAST_CAPABILITY)} or higher; use another GPU, or --device cpu"
        )
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums are made in float32 everywhere
    if not gpu.suits(torch.empty(0, device=device)):
        raise ConfigError("--device: the kernels for GPUs need Triton, which is not installed; pip install triton")
    return device


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def computing_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """Of everything that is not quantized. Raises ConfigError where the device has no kernels for it."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if config.dtype == "float32" and device.type != "cpu":
        raise ConfigError("--dtype: found float32, expected bfloat16 or float16 on a GPU; or use --device cpu")
    return TYPES[config.dtype]


def kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """Of stored keys and values. dtype: the computing type."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8_e4m3" else dtype
