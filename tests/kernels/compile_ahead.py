"""Compile every kernel ahead of time for one card, in the shapes of the published models; no GPU is needed.

The public functions run on tensors without memory (torch's meta device), and each launch is compiled in place of being
run. Prints a JSON line per kernel: what it is for, and what the compiled binary needs. A program of its own, because
kernels that are defined for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from nextn.kernels import gpu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.published import all_launches
from tests.kernels.published.common import SHARED_MEMORY

TYPES = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
PROCESSORS = 132


class Launch(NamedTuple):
    """One specialisation of a kernel, and the first shape that asked for it."""

    kernel: Any
    source: ASTSource
    options: dict[str, Any]
    case: str


def recorded(arch: int) -> list[Launch]:
    """Everything that the published models launch on this card, each specialisation once."""
    found: dict[str, Launch] = {}
    case = ""

    def record(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
    ) -> None:
        assert all(0 < n < 2**31 for n in grid), f"{case}: {kernel.__name__} has the grid {grid}"
        assert all(n < 2**16 for n in grid[1:]), f"{case}: {kernel.__name__} has the grid {grid}"
        options = gpu.launch_options(num_warps, num_stages, starts_early=arch >= 90)
        source = specialised(kernel, arguments, {**constants, "EARLY": options.pop("EARLY")})
        key = f"{kernel.__name__} {source.signature} {source.constants} {source.attrs} {options}"
        found.setdefault(key, Launch(kernel, source, options, case))

    gpu.launch = record
    gpu.suits = lambda *tensors: True  # type: ignore[assignment]
    gpu.has_fp8_units = lambda device: arch >= 89  # type: ignore[assignment]
    gpu.has_descriptors = lambda device: arch >= 90  # type: ignore[assignment]
    gpu.starts_early = lambda device: arch >= 90
    gpu.num_processors = lambda device: PROCESSORS  # type: ignore[assignment]
    gpu.shared_memory = lambda device: SHARED_MEMORY[arch]  # type: ignore[assignment]
    for case, run in all_launches(has_fp8_units=arch >= 89):  # noqa: B007 - read by record
        run()
    return list(found.values())


def specialised(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """As Triton specialises a launch: ones are constants, multiples of 16 and aligned tensors are known to be such."""
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(arguments), f"{kernel.__name__} takes {names}, got {len(arguments)} arguments"
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in kernel.do_not_specialize:
            constants = {**constants, name: 1}
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        is_aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0)
        if is_aligned and name not in kernel.do_not_specialize:
            attributes[kernel.arg_names.index(name),] = [["tt.divisibility", 16]]
    everything = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return ASTSource(kernel, signature=everything, constexprs=constants, attrs=attributes)


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile and look at what came out."""
    try:
        binary = triton.compile(launch.source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    except Exception as error:
        return {
            "kernel": launch.kernel.__name__,
            "case": launch.case,
            "error": f"{type(error).__name__}: {error}"[:2000],
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    line = next(line for line in usage.splitlines() if "REG:" in line)
    figures = dict(part.split(":") for part in line.split() if part.startswith(("REG:", "STACK:", "LOCAL:")))
    ptx = binary.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "case": launch.case,
        "options": launch.options,
        "registers": int(figures["REG"]),
        "stack_bytes": int(figures["STACK"]) + int(figures["LOCAL"]),
        "spills_in_loops": spills_in_loops(sass),
        "shared_bytes": binary.metadata.shared,
        "uses_wgmma": "wgmma.mma_async" in ptx,
        "uses_mma": "mma.sync" in ptx,
        "uses_tcgen05": "tcgen05.mma" in ptx,
        "reads_early": accesses_before_waiting(
            ptx, ("ld.global", "cp.async.ca", "cp.async.cg", "cp.async.bulk.tensor")
        ),
        "writes_early": accesses_before_waiting(ptx, ("st.global", "atom.global", "red.global")),
        "multiplies_fp8": any(
            "e4m3" in line or "f8f6f4" in line
            for line in ptx.splitlines()
            if any(name in line for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))
        ),
        "constants": {
            launch.kernel.arg_names[place]: value
            for (place,), value in launch.source.constants.items()
            if isinstance(value, int)
        },
    }


def spills_in_loops(sass: str) -> int:
    """How often the innermost loops of a kernel move registers to or from a thread's own memory."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    code = [(int(address, 16), text) for address, text in lines]
    loops = [
        (int(target.group(1), 16), address)
        for address, text in code
        if (target := re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)) and int(target.group(1), 16) < address
    ]
    innermost = [
        (first, last)
        for first, last in loops
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops)
    ]
    spills = [address for address, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(first <= address <= last for address in spills for first, last in innermost)


def accesses_before_waiting(ptx: str, instructions: tuple[str, ...]) -> int | None:
    """How often they touch memory while the launch before may still run; None if that is not waited for."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return sum(before.count(instruction) for instruction in instructions) if wait else None


def main(arguments: list[str]) -> Iterator[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", type=int, required=True, help="compute capability, such as 90")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--part", type=int, default=0, help="which share of the kernels, from 0")
    parser.add_argument("--parts", type=int, default=1, help="into how many shares they are divided, among processes")
    options = parser.parse_args(arguments)
    launches = [one for one in recorded(options.arch) if options.only in one.kernel.__name__]
    for one in launches[options.part :: options.parts]:
        yield compiled(one, options.arch)


if __name__ == "__main__":
    for found in main(sys.argv[1:]):
        print(json.dumps(found), flush=True)
