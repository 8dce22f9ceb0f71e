"""The card, and its limits as measured here: memory bandwidth, and FP8 products."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from nextn.kernels import gpu

from benchmarks.gpu.place import Place, those_that_run
from benchmarks.gpu.row import Failure, Machine, Outcome


def measure(place: Place) -> Iterator[Outcome]:
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {_triton_version()}"
    of_card: dict[str, Any] = {}
    if place.is_rehearsal:
        card, driver, memory = f"rehearsal on a {platform.machine()} CPU", "none", 0
    else:
        properties = torch.cuda.get_device_properties(place.device)
        card, memory = properties.name, properties.total_memory
        driver = _driver()
        of_card = {
            "capability": (properties.major, properties.minor),
            "processors": gpu.num_processors(place.device),
            "shared_memory": gpu.shared_memory(place.device),
        }
    bandwidth = flops = None
    try:
        bandwidth = _copy_bandwidth(place)
    except Exception as error:
        yield Failure("copy bandwidth", f"{type(error).__name__}: {error}")
    try:
        flops = _fp8_flops(place)
    except Exception as error:  # a card without FP8 units
        yield Failure("FP8 product of torch", f"{type(error).__name__}: {error}")
    yield Machine(card, driver, versions, memory, bandwidth, flops, **of_card)


def _copy_bandwidth(place: Place) -> float:
    """The better of torch's copy and of an elementwise kernel."""
    source = torch.randn((1 << 12) if place.is_rehearsal else 1 << 29, device=place.device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 1.0, out=target))
    return 2 * source.nbytes / min(place.seconds_per_call([way]) for way in ways)


def _fp8_flops(place: Place) -> float:
    """The better of torch's two ways to accumulate, with a scale per row and per channel."""
    size = 64 if place.is_rehearsal else 8192
    x, weight = (torch.randn(size, size, device=place.device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(size, 1, device=place.device), torch.ones(1, size, device=place.device)
    ways = [
        partial(
            *(torch._scaled_mm, x, weight.t(), rows, columns), out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum
        )
        for use_fast_accum in (False, True)
    ]
    return 2 * size**3 / min(place.seconds_per_call([way]) for way in those_that_run(ways))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)
