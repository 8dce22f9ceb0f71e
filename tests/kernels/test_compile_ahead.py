"""Every Triton kernel compiles for the cards that are served, in the published models' shapes, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.card import SHARED_MEMORY

READ_EARLY = {"_norm_rows", "_rope_and_cache", "attend_tiles", "merge_parts", "_expert_matmul"}
"""Kernels that read what is older than the launch before, while that may still run."""
TWO_REGISTERS = 8
"""Bytes that may be put aside outside of loops in a product for capability 8.0, so that two programs share a
processor; nowhere else anything may."""


def compiled(arch: int, cache: Path, *options: str) -> list[dict[str, Any]]:
    """Figures of each kernel. In a process of its own, since here kernels may be interpreted.

    options: see compile_ahead
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead", "--arch", str(arch), *options]
    ran = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert ran.returncode == 0, "see the process's message above"
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.timeout(900)  # some three hundred runs of ptxas
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_every_kernel_compiles_and_fits(arch: int, tmp_path: Path) -> None:
    """For capability 10.0 kernels are compiled, not tuned: some put registers aside."""
    pytest.importorskip("triton")
    kernels = compiled(arch, tmp_path)
    assert {"_matmul", "_project", "_norm_rows"} <= {one["kernel"] for one in kernels}
    errors = [one for one in kernels if "error" in one]
    assert not errors, errors
    for one in kernels:
        assert one["shared_bytes"] <= SHARED_MEMORY[arch], one
        is_product = one["kernel"] in ("_matmul", "_project")
        if arch < 100:
            assert one["stack_bytes"] <= (TWO_REGISTERS if is_product and arch == 80 else 0), one
            assert one["spills_in_loops"] == 0, one
        if arch == 90:
            assert one["late_copies"] == 0, one
        if arch >= 90:
            assert one["writes_early"] == 0, one
            assert one["reads_early"] == 0 or one["kernel"] in READ_EARLY, one
        if is_product:
            assert one[{90: "uses_wgmma", 100: "uses_tcgen05"}.get(arch, "uses_mma")], one
        if one["kernel"] == "_matmul" and one["constants"]["HAS_X_SCALE"]:
            assert one["multiplies_fp8"], one


@pytest.mark.timeout(900)
def test_products_of_codes_and_wide_activations_are_as_good_on_cards_that_multiply_fp8(tmp_path: Path) -> None:
    """For checkpoints that quantize weights only."""
    pytest.importorskip("triton")
    kernels = compiled(90, tmp_path, "--wide", "--only", "matmul")
    assert {one["kernel"] for one in kernels} == {"_matmul", "_expert_matmul"}
    for one in kernels:
        assert "error" not in one, one
        assert one["shared_bytes"] <= SHARED_MEMORY[90], one
        assert (one["stack_bytes"], one["spills_in_loops"], one["late_copies"]) == (0, 0, 0), one
        assert one["uses_wgmma"], one
        assert not one["multiplies_fp8"], one


SASS = """
        /*0040*/                   STL [R1], R4 ;
        /*0050*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0060*/                   {spilling} ;
        /*0070*/              @!P0 BRA 0x60 ;
        /*0080*/              @!P1 BRA 0x50 ;
        /*0090*/                   LDL R4, [R1] ;
        /*00a0*/                   EXIT ;
"""


def test_spills_are_counted_in_innermost_loops_alone() -> None:
    """Two loops, one within the other, between a store and a load of a register."""
    pytest.importorskip("triton")
    from tests.kernels.compile_ahead import spills_in_loops

    assert spills_in_loops(SASS.format(spilling="FADD R4, R4, R5")) == 0
    assert spills_in_loops(SASS.format(spilling="LDL.LU R4, [R1+0x8]")) == 1


TTGIR = """
    %0 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (i32) {
      %1 = scf.for %j = %a to %b step %c iter_args(%x = %y) -> (i32) {
        %2 = ttg.async_wait %k, %v {num = NUM : i32} loc(#loc1)
      } loc(#loc2)
      %3 = ttg.async_wait {num = 0 : i32} loc(#loc3)
    } loc(#loc4)
    %4 = ttg.async_wait {num = 0 : i32} loc(#loc5)
"""


def test_copies_that_are_waited_for_at_once_are_counted_in_innermost_loops_alone() -> None:
    pytest.importorskip("triton")
    from tests.kernels.compile_ahead import late_copies

    assert late_copies(TTGIR.replace("NUM", "2")) == 0
    assert late_copies(TTGIR.replace("NUM", "0")) == 1
