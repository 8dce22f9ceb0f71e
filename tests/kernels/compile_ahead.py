"""Compile every kernel ahead of time for one card, in the shapes of the published models; no GPU is needed.

The public functions run on tensors without memory (torch's meta device), and each launch is compiled in place of being
run. Prints a JSON line per kernel: what it is for, and what the compiled binary needs. A program of its own, because
kernels that are defined for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from nextn.kernels import gpu
from triton.runtime import driver

from tests.card import Card
from tests.kernels.published import all_launches
from tests.kernels.published.common import META


class Launch(NamedTuple):
    """One specialisation of a kernel, what it came to, or why it did not compile, and the first shape that asked."""

    kernel: Any
    options: dict[str, Any]
    constants: dict[str, Any]
    case: str
    binary: Any
    error: Exception | None


def launches(only: str, *, has_fp8_units: bool, pool: ThreadPoolExecutor) -> list[Launch]:
    """Everything that the published models launch on the active card, each specialisation once, compiled.

    only: part of a kernel's name
    """
    asked: dict[int, Launch] = {}
    case = ""

    def compile_in_place(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
    ) -> None:
        assert all(0 < n < 2**31 for n in grid), f"{case}: {kernel.__name__} has the grid {grid}"
        assert all(n < 2**16 for n in grid[1:]), f"{case}: {kernel.__name__} has the grid {grid}"
        if only not in kernel.__name__:
            return
        options = gpu.launch_options(num_warps, num_stages, starts_early=gpu.starts_early(META))
        binary = kernel.warmup(*arguments, grid=grid, **constants, **options)
        asked.setdefault(id(binary), Launch(kernel, options, constants, case, binary, None))

    gpu.launch = compile_in_place
    with triton.AsyncCompileMode(pool, ignore_errors=True):
        for case, run in all_launches(has_fp8_units=has_fp8_units):  # noqa: B007 - read above
            run()
        return [_awaited(launch) for launch in asked.values()]


def _awaited(launch: Launch) -> Launch:
    try:
        return launch._replace(binary=launch.binary.result())
    except Exception as error:
        return launch._replace(error=error)


def figures(launch: Launch) -> dict[str, Any]:
    """What the binary needs."""
    binary, error = launch.binary, launch.error
    if error is not None:
        return {
            "kernel": launch.kernel.__name__,
            "case": launch.case,
            "error": f"{type(error).__name__}: {error}"[:2000],
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _of_cuobjdump("-res-usage", file.name)
        line = next(line for line in usage.splitlines() if "REG:" in line)
        usage_by_name = dict(part.split(":") for part in line.split() if part.startswith(("REG:", "STACK:", "LOCAL:")))
        stack_bytes = int(usage_by_name["STACK"]) + int(usage_by_name["LOCAL"])
        # Without memory of their own threads cannot put registers aside, and taking a kernel apart takes long.
        num_spills = spills_in_loops(_of_cuobjdump("-sass", file.name)) if stack_bytes else 0
    ptx = binary.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "case": launch.case,
        "options": launch.options,
        "registers": int(usage_by_name["REG"]),
        "stack_bytes": stack_bytes,
        "spills_in_loops": num_spills,
        "shared_bytes": binary.metadata.shared,
        "uses_wgmma": "wgmma.mma_async" in ptx,
        "uses_mma": "mma.sync" in ptx,
        "uses_tcgen05": "tcgen05.mma" in ptx,
        "late_copies": late_copies(binary.asm["ttgir"]),
        "reads_early": accesses_before_waiting(
            ptx, ("ld.global", "cp.async.ca", "cp.async.cg", "cp.async.bulk.tensor")
        ),
        "writes_early": accesses_before_waiting(ptx, ("st.global", "atom.global", "red.global")),
        "multiplies_fp8": any(
            "e4m3" in line or "f8f6f4" in line
            for line in ptx.splitlines()
            if any(name in line for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))
        ),
        "constants": {name: value for name, value in launch.constants.items() if isinstance(value, int)},
    }


def _of_cuobjdump(option: str, cubin: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def spills_in_loops(sass: str) -> int:
    """How often the innermost loops of a kernel move registers to or from a thread's own memory."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    code = [(int(address, 16), text) for address, text in lines]
    loops = [
        (int(target.group(1), 16), address)
        for address, text in code
        if (target := re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)) and int(target.group(1), 16) < address
    ]
    spills = [address for address, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(first <= address <= last for address in spills for first, last in _innermost(loops))


def late_copies(ttgir: str) -> int:
    """How often the innermost loops wait for the copy that was asked for last, with none on its way meanwhile."""
    lines = ttgir.splitlines()
    loops: list[tuple[int, int]] = []
    for first, line in enumerate(lines):
        if "scf.for " in line:
            end = line[: len(line) - len(line.lstrip())] + "}"
            loops.append((first, next(i for i in range(first + 1, len(lines)) if lines[i].startswith(end))))
    waits = [i for i, line in enumerate(lines) if "ttg.async_wait" in line and "{num = 0 :" in line]
    return sum(first < wait < last for wait in waits for first, last in _innermost(loops))


def _innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the loops, each a first and a last place, that hold no other."""
    return [
        (first, last)
        for first, last in loops
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops)
    ]


def accesses_before_waiting(ptx: str, instructions: tuple[str, ...]) -> int | None:
    """How often they touch memory while the launch before may still run; None if that is not waited for."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return sum(before.count(instruction) for instruction in instructions) if wait else None


def main(arguments: list[str]) -> Iterator[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", type=int, required=True, help="compute capability, such as 90")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--wide", action="store_true", help="with activations that are not quantized")
    options = parser.parse_args(arguments)
    driver.set_active(Card(options.arch))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        quantizes = options.arch >= 89 and not options.wide
        yield from pool.map(figures, launches(options.only, has_fp8_units=quantizes, pool=pool))


if __name__ == "__main__":
    for found in main(sys.argv[1:]):
        print(json.dumps(found), flush=True)
