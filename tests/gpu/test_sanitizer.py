"""NVIDIA's compute-sanitizer over kernels that share memory between warps and between programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/kernels/test_triton_matmul.py::test_per_token_and_per_channel[size3-both]",
    "tests/kernels/test_triton_attention.py::test_many_splits_of_few_long_sequences[4]",
]


@pytest.fixture
def sanitizer(cuda: torch.device) -> str:
    path = shutil.which("compute-sanitizer")
    if path is None:
        pytest.skip("needs compute-sanitizer, a part of the CUDA toolkit, on PATH")
    return path


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("test", TESTS)
def test_kernels_neither_leave_their_memory_nor_race(test: str, tool: str, sanitizer: str) -> None:
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", test]
    # Without torch's cache of memory each tensor has bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_chosen_tests_exist() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert all(test in done.stdout for test in TESTS)
