"""What kernels touch before they wait for the launch before them, watched in Triton's interpreter.

The rule (``gpu.wait_for_predecessor``): a kernel's programs may begin while the launch before still runs, so before
they wait they store nothing, and load nothing that it stores. Every program waits and then lets the next launch begin,
so whatever was stored before that launch is old enough.

Only launches of this package are taken to order anything. An operation of torch's, which may be a library's kernel, a
copy or a collective, could let the next launch begin whenever it likes; so what it stores counts as just stored until
the next launch of this package has waited, and so does what the launch before it stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from nextn.kernels import gpu
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

Spans = np.ndarray
"""Places in memory, [n, 2] int64: the first byte of each, and the byte after its last."""

PREFETCH_UNIT = 16
"""Bytes; what is asked for ahead begins and ends at multiples of it (PTX, cp.async.bulk.prefetch)."""


class LaunchWatch(TorchDispatchMode):
    """Watches launches, and torch's operations while it is entered.

    faults: where the rule was broken, in words
    launched: how often each kernel was launched; early: in how many of these it loaded something before it waited
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.launched: Counter[str] = Counter()
        self.early: Counter[str] = Counter()
        self._kernel = ""
        self._is_in_program = False
        self._has_waited = False
        self._arguments: list[Spans] = []
        self._loads: list[Spans] = []
        self._stores: list[Spans] = []
        self._just_stored: list[tuple[str, Spans]] = []

    @contextmanager
    def launch(self, kernel: str, tensors: list[torch.Tensor]) -> Iterator[None]:
        """A launch of this package, while it runs."""
        self._kernel = kernel
        self._arguments = [_of_storage(tensor) for tensor in tensors]
        self._loads, self._stores, self._is_in_program = [], [], False
        with _disable_current_modes():  # the interpreter computes with torch too
            yield
        self._end_program()
        self._is_in_program = False
        self.launched[kernel] += 1
        self.early[kernel] += bool(self._loads)
        for writer, stored in self._just_stored if self._loads else []:
            if overlap(np.concatenate(self._loads), stored):
                self._blame(f"loads what {writer} stores, before it waits")
        self._just_stored = [(kernel, np.concatenate(self._stores))] if self._stores else []

    def begin_program(self) -> None:
        self._end_program()
        self._is_in_program, self._has_waited = True, False

    def _end_program(self) -> None:
        if self._is_in_program and not self._has_waited:
            self._blame("has a program that never waits")

    def wait(self) -> None:
        self._has_waited = True

    def let_next_begin(self) -> None:
        if not self._has_waited:
            self._blame("lets the next launch begin before it waits")

    def load(self, places: Spans) -> None:
        if not self._has_waited and len(places):
            self._loads.append(places)

    def store(self, places: Spans) -> None:
        if not self._has_waited and len(places):
            self._blame("stores before it waits")
        self._stores.append(places)

    def prefetch(self, places: Spans) -> None:
        """What is asked for ahead of waiting, which may be stale: whole units of one of the arguments."""
        if len(places) and (places % PREFETCH_UNIT).any():
            self._blame("asks ahead for parts of units")
        if len(places) and not any(_is_inside(places, memory) for memory in self._arguments):
            self._blame("asks ahead for what is in none of its arguments")

    def _blame(self, what: str) -> None:
        fault = f"{self._kernel} {what}"
        if fault not in self.faults:
            self.faults.append(fault)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes what torch's operations store: all that they return, but for views and fresh memory.

        The host's numbers count too (lift_fresh), since on a GPU they are copied to it.
        """
        options = kwargs or {}
        with self:
            parts = func.decompose(*args, **options)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **options)
        name = func.overloadpacket.__name__
        if name == "lift_fresh" or not (func.is_view or "empty" in name):
            returned = out if isinstance(out, tuple | list) else [out]
            changed = [x for x in returned if isinstance(x, torch.Tensor) and x.numel()]
            self._just_stored += [(name, _of_elements(x)) for x in changed]
        return out


def overlap(some: Spans, others: Spans) -> bool:
    """Whether a byte is in both."""
    others = others[np.argsort(others[:, 0])]
    furthest = np.maximum.accumulate(others[:, 1])
    # Of those that begin before one's end, does any reach beyond its beginning?
    num_before = np.searchsorted(others[:, 0], some[:, 1], side="left")
    return bool(((num_before > 0) & (furthest[num_before - 1] > some[:, 0])).any())


def _is_inside(places: Spans, memory: Spans) -> bool:
    return bool(((places[:, 0] >= memory[0, 0]) & (places[:, 1] <= memory[0, 1])).all())


def _of_storage(tensor: torch.Tensor) -> Spans:
    storage = tensor.untyped_storage()
    return np.array([[storage.data_ptr(), storage.data_ptr() + storage.nbytes()]])


def _of_elements(tensor: torch.Tensor) -> Spans:
    """From the first element to the last, with what lies between."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return np.array([[tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize]])


def _of_pointers(pointers: TensorHandle, mask: TensorHandle | None) -> Spans:
    addresses = pointers.data.astype(np.int64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    return np.stack([addresses.ravel(), addresses.ravel() + size], 1)


def watch_launches(monkeypatch: pytest.MonkeyPatch) -> LaunchWatch:
    """Until the test ends, kernels are launched as on a card where programs start early, and watched."""
    watch = LaunchWatch()
    builder = interpreter.InterpreterBuilder

    def look(method: str, see: Callable[..., None]) -> None:
        original = getattr(builder, method)

        def seen(self: Any, *arguments: Any, **options: Any) -> Any:
            see(*arguments)
            return original(self, *arguments, **options)

        monkeypatch.setattr(builder, method, seen)

    def change(pointers: TensorHandle, mask: TensorHandle | None) -> None:
        watch.load(_of_pointers(pointers, mask))
        watch.store(_of_pointers(pointers, mask))

    look("set_grid_idx", lambda *place: watch.begin_program())
    look("create_masked_load", lambda pointers, mask, *_: watch.load(_of_pointers(pointers, mask)))
    look("create_masked_store", lambda pointers, value, mask, *_: watch.store(_of_pointers(pointers, mask)))
    look("create_atomic_rmw", lambda operation, pointers, value, mask, *_: change(pointers, mask))
    look("create_atomic_cas", lambda pointers, *_: change(pointers, None))

    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **constants: Any) -> None:
        tensors = [getattr(one, "base", one) for one in arguments if not isinstance(one, int | float)]
        with watch.launch(self.fn.__name__, tensors):
            run(self, *arguments, **constants)

    def assembly(self: Any, text: str, constraints: str, values: list[TensorHandle], *_: Any) -> _Zeros:
        """Of prefetch_rows: addresses and sizes."""
        assert "cp.async.bulk.prefetch" in text, "no other is written"
        first, size = (value.data.astype(np.int64).ravel() for value in values)
        watch.prefetch(np.stack([first, first + size], 1)[size > 0])
        return _Zeros(values[0].data.shape)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(builder, "create_inline_asm", assembly)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", watch.wait)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", watch.let_next_begin)
    monkeypatch.setattr(gpu, "starts_early", lambda device: True)
    return watch


class _Zeros:
    """What assembly returns that computes nothing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_result(self, index: int) -> TensorHandle:
        return TensorHandle(np.zeros(self._shape, np.int32), tl.int32)
