"""Triton's interpreter on the CPU, made to round as the hardware does."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from nextn.kernels import gpu

from tests.races import watch_for_races

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}


def stand_in_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, tensors on the CPU go to Triton's kernels, which its interpreter runs."""
    from triton.runtime import interpreter

    _patch_triton_once_a_launch(monkeypatch)
    monkeypatch.setattr(interpreter, "_convert_float", _convert_as_the_hardware)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot_as_the_hardware)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_mul", _multiply_within_int32)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", _sum_as_the_hardware)
    _shuffle_programs(monkeypatch)
    watch_for_races(monkeypatch)
    monkeypatch.setattr(gpu, "suits", lambda *tensors: True)
    monkeypatch.setattr(gpu, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(gpu, "has_descriptors", lambda device: True)
    monkeypatch.setattr(gpu, "starts_early", lambda device: False)
    monkeypatch.setattr(gpu, "num_processors", lambda device: 132)
    monkeypatch.setattr(gpu, "shared_memory", lambda device: 227 * 1024)


def _patch_triton_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter puts its own functions into Triton's modules, again in every call within a kernel, which takes as
    long as the kernel itself."""
    from triton import language as tl
    from triton.runtime import interpreter

    patched: set[frozenset[int]] = set()
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(function: Any) -> Any:
        modules = frozenset(id(one) for one in function.__globals__.values() if one is tl or one is tl.core)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch(function)

    def launch(self: Any, *arguments: Any, **constants: Any) -> None:
        patched.clear()
        run(self, *arguments, **constants)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


def _shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's programs run in an order that nobody may count on."""
    from triton.runtime.interpreter import InterpreterBuilder

    begin = InterpreterBuilder.set_grid_idx

    def begin_another(self: Any, *place: int) -> None:
        size = tuple(self.grid_dim)
        order = _order_of(math.prod(size))
        begin(self, *(int(i) for i in np.unravel_index(order[np.ravel_multi_index(place, size)], size)))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", begin_another)


@lru_cache(maxsize=16)
def _order_of(num_programs: int) -> Any:
    return np.random.default_rng(num_programs).permutation(num_programs)


def _convert_as_the_hardware(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """To the nearest, ties to even, as cvt.rn does; the interpreter's own conversion cuts bits off.

    values: a numpy array, of unsigned integers where numpy lacks the type. Returns unsigned integers.
    """
    given = torch.from_numpy(np.ascontiguousarray(values)).view(_DTYPES[str(source)])
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    converted = given.to(_DTYPES[str(target)])
    return converted.view(plain[converted.itemsize]).numpy().view(unsigned[converted.itemsize])


def _multiply_within_int32(self: Any, a: Any, b: Any) -> Any:
    """A product of int32 that is none would be a place outside of all tensors."""
    product = self.binary_op(a, b, np.multiply)
    if product.data.dtype == np.int32:
        assert (np.multiply(a.data, b.data, dtype=np.int64) == product.data).all(), "a product overflows int32"
    return product


def _sum_as_the_hardware(self: Any, values: Any) -> Any:
    """In an order that depends on the tile's shape, as that of threads does: batches of other sizes round otherwise."""
    given = values.handle.data
    if self.axis is not None and given.dtype.kind == "f":
        order = np.random.default_rng(given.shape).permutation(given.shape[self.axis])
        given = np.take(given, order, self.axis)
    return self.to_tensor(np.sum(given, axis=self.axis, keepdims=self.keep_dims), values.dtype)


def _dot_as_the_hardware(
    self: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: Any
) -> Any:
    """Products whose rounding does not depend on a row's place; the interpreter takes bfloat16's bits for integers."""
    from triton.runtime.interpreter import TensorHandle

    wide = [_wide(operand) for operand in (a, b)]
    return TensorHandle(np.matmul(*wide).astype(np.float32) + total.data, total.dtype.scalar)


def _wide(operand: Any) -> Any:
    name = str(operand.dtype.scalar)
    given = torch.from_numpy(np.ascontiguousarray(operand.data))
    return (given if given.is_floating_point() else given.view(_DTYPES[name])).double().numpy()
