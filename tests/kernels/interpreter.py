"""Triton's interpreter with the rounding of the hardware, and CPU tensors that go to it. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from nextn.kernels import gpu

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """The public functions give CPU tensors to Triton, as those of a card like an H100."""
    from triton.runtime import interpreter

    of_card = {
        "suits": lambda *tensors: True,
        "has_fp8_units": lambda device: True,
        "has_descriptors": lambda device: True,
        "num_processors": lambda device: 132,
        "shared_memory": lambda device: 227 * 1024,
    }
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter, "_convert_float", _convert_as_the_hardware))
        patches.enter_context(mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot_as_the_hardware))
        for name, function in of_card.items():
            patches.enter_context(mock.patch.object(gpu, name, function))
        yield


def _convert_as_the_hardware(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """To the nearest, ties to even, as cvt.rn does; the interpreter's own conversion cuts bits off.

    values: a numpy array, of unsigned integers where numpy lacks the type. Returns unsigned integers.
    """
    given = torch.from_numpy(np.ascontiguousarray(values)).view(_DTYPES[str(source)])
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    converted = given.to(_DTYPES[str(target)])
    return converted.view(plain[converted.itemsize]).numpy().view(unsigned[converted.itemsize])


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
