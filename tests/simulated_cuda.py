"""A simulated GPU: tensors of the CPU that obey a GPU's rules, so that the engine runs as it does on a card.

Operations do not mix devices, numpy sees nothing, the host reads nothing while a graph is recorded, pinned memory is
made only as torch makes it, and a kernel gets no tensor of the host. A graph is the list of what was done, done again
over the same memory. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nextn.distributed import parallel
from nextn.execution import rehearsal, shard
from nextn.kernels import gpu
from torch.overrides import TorchFunctionMode

from tests.interpreter import stand_in_for_a_gpu

READS = {
    *("tolist", "item", "equal", "allclose", "nonzero", "unique", "masked_select", "is_nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
}
"""What the host cannot know before the device has done all."""


class OnGpu(torch.Tensor):
    """A tensor whose values lie in the CPU's memory. Used only within SimulatedCuda."""

    __torch_function__ = torch._C._disabled_torch_function_impl


Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class SimulatedCuda(TorchFunctionMode):
    """While this is entered, torch has GPUs, of which this process uses one. Ranks exchange tensors over gloo.

    index: the GPU's; recording: the operations of the graph that is being recorded
    """

    def __init__(self, patch: pytest.MonkeyPatch, index: int = 0) -> None:
        super().__init__()
        self._device = torch.device("cuda", index)
        self.recording: list[Operation] | None = None
        self.num_replays = 0
        suits = gpu.suits
        stand_in_for_a_gpu(patch)
        patch.setattr(gpu, "suits", suits)
        self._patch_torch(patch)
        patch.setattr(gpu, "has_descriptors", lambda device: False)
        patch.setattr(gpu, "num_processors", lambda device: 2)
        patch.setattr(gpu, "launch", self._launch)
        # Both are of every kernel that there is, and compile what the interpreter does not.
        patch.setattr(shard, "_compile_ahead", lambda *arguments: None)
        patch.setattr(rehearsal, "warm_up_kernels", lambda *arguments, **options: None)

    def _patch_torch(self, patch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(major=9, minor=0, multi_processor_count=2, name="simulated", total_memory=16 << 30)
        found = {
            "is_available": lambda: True,
            "device_count": lambda: 8,
            "current_device": lambda: self._device.index,
            "get_device_properties": lambda device=None: properties,
            "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
            "Event": lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
            "Stream": lambda device=None: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device=None: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "graph_pool_handle": lambda: (0, 1),
            "CUDAGraph": lambda: _Graph(self),
            "graph": lambda graph, **options: graph,
        }
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
            found[name] = lambda device=None: 1 << 20
        for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
            found[name] = lambda device=None: None
        for name, made in found.items():
            patch.setattr(torch.cuda, name, made)
        for place, name in ((dist, "all_reduce"), (dist, "broadcast"), (parallel, "_all_gather")):
            patch.setattr(place, name, self._exchange(getattr(place, name)))
        begin = dist.init_process_group
        patch.setattr(dist, "init_process_group", lambda backend, **options: begin("gloo", **options))
        make_generator = torch.Generator
        patch.setattr(torch, "Generator", lambda device=None: make_generator())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", str(func)), dict(kwargs or {})
        given = [x for x in _flat((args, options)) if not x.is_meta]
        on_gpu = [x for x in given if isinstance(x, OnGpu)]
        if name == "__get__":
            return self._attribute(func, *args)
        if name == "pin_memory" and not on_gpu:
            return args[0].clone()
        if (
            options.pop("pin_memory", False)
            and func is torch.tensor
            and isinstance(args[0], (np.ndarray, torch.Tensor))
        ):
            raise RuntimeError("Can't pin tensor constructed from numpy or a variable")
        if name in ("to", "cpu"):
            return self._move(func, args, options)
        is_made = options.get("device") is not None and torch.device(options["device"]).type == "cuda"
        if is_made:
            assert torch.device(options["device"]).index in (None, self._device.index), f"{name}: of another rank"
            options["device"] = "cpu"
        elif not on_gpu:
            return func(*args, **options)
        if name in ("numpy", "__array__", "pin_memory"):
            raise TypeError(f"can't {name} a cuda:0 device type tensor")
        if name in READS or func is torch.tensor or _has_mask(name, args):
            self._wait(name)
        if name != "copy_":
            others = [x for x in given if not isinstance(x, OnGpu) and x.dim() > 0]
            assert not others, f"{name}: tensors on two devices"
        elif len(on_gpu) == 1 and not (options.get("non_blocking") or args[2:]):
            self._wait(name)
        return self._do(func, args, options)

    def _attribute(self, func: Callable[..., Any], x: Any, *rest: Any) -> Any:
        name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        known = {"device": self._device, "is_cuda": True, "is_cpu": False}
        if isinstance(x, OnGpu) and name in known:
            return known[name]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(_on_cpu(x), *rest)
        return found.as_subclass(OnGpu) if isinstance(x, OnGpu) and isinstance(found, torch.Tensor) else found

    def _move(self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """x.to(...) and x.cpu()."""
        x, *rest = args
        wanted = [one for one in [*rest, options.get("device")] if isinstance(one, (torch.device, str))]
        from_gpu = isinstance(x, OnGpu)
        target = torch.device(wanted[0]) if wanted else self._device if from_gpu else x.device
        if func is torch.Tensor.cpu:
            target = torch.device("cpu")
        if target.type == "meta" or x.is_meta:
            with torch._C.DisableTorchFunctionSubclass():
                return _on_cpu(x).to(target)
        to_gpu = target.type == "cuda"
        if from_gpu != to_gpu and not options.get("non_blocking"):
            self._wait("a copy")
        if from_gpu and to_gpu:
            rest = [one for one in rest if not isinstance(one, (torch.device, str))]
            options.pop("device", None)
            return self._do(func, (x, *rest), options) if rest or options else x
        rest = [torch.device("cpu") if isinstance(one, (torch.device, str)) else one for one in rest]
        if "device" in options:
            options["device"] = torch.device("cpu")
        assert self.recording is None or from_gpu == to_gpu, "a copy between devices while recording"
        with torch._C.DisableTorchFunctionSubclass():
            moved = func(_on_cpu(x), *rest, **options)
            moved = moved.clone() if from_gpu != to_gpu else moved
            return moved.as_subclass(OnGpu) if to_gpu else moved

    def _do(self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An operation on the device. What it returns of what it was given is the same tensor."""
        given: list[tuple[torch.Tensor, torch.Tensor]] = []

        def on_cpu(x: torch.Tensor) -> torch.Tensor:
            given.append((_on_cpu(x), x))
            return given[-1][0]

        def on_gpu(x: torch.Tensor) -> torch.Tensor:
            same = [old for plain, old in given if plain is x]
            return same[0] if same else x.as_subclass(OnGpu)

        with torch._C.DisableTorchFunctionSubclass():
            out = _mapped(func(*_mapped(args, on_cpu), **_mapped(options, on_cpu)), on_gpu)
        if self.recording is not None:
            self.recording.append((func, args, options, out))
        return out

    def _wait(self, name: str) -> None:
        assert self.recording is None, f"{name} waits for the device while a graph is recorded"

    def _exchange(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """A collective operation: tensors of the GPU's are exchanged on it, others at once."""

        def exchanged(x: torch.Tensor, *rest: Any) -> Any:
            if isinstance(x, OnGpu):
                assert all(isinstance(one, OnGpu) for one in _flat(rest)), f"{collective.__name__}: not on a GPU"
                return self._do(collective, (x, *rest), {})
            assert self.recording is None, f"{collective.__name__} on the host while a graph is recorded"
            return collective(x, *rest)

        return exchanged

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 1, **sizes: Any
    ) -> None:
        assert all(isinstance(x, OnGpu) for x in args if isinstance(x, torch.Tensor)), (
            f"{kernel.__name__}: not on a GPU"
        )

        def run(*tensors: Any) -> None:
            kernel[grid](*tensors, **sizes, **gpu.launch_options(num_warps, num_stages, starts_early=False))

        self._do(run, args, {})


class _Graph:
    """Records while it is entered."""

    def __init__(self, mode: SimulatedCuda) -> None:
        self._mode = mode
        self._operations: list[Operation] = []

    def __enter__(self) -> None:
        self._mode.recording = self._operations

    def __exit__(self, *error: object) -> None:
        self._mode.recording = None

    @property
    def holds_operations(self) -> bool:
        return bool(self._operations)

    def reset(self) -> None:
        self._operations = []

    def replay(self) -> None:
        self._mode.num_replays += 1
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            for func, args, options, out in self._operations:
                new = func(*_mapped(args, _on_cpu), **_mapped(options, _on_cpu))
                for old, one in zip(_flat(out), _flat(new), strict=True):
                    if old.data_ptr() != one.data_ptr():
                        _on_cpu(old).copy_(one)


def _on_cpu(x: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return x.as_subclass(torch.Tensor) if isinstance(x, OnGpu) else x


def _has_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a result has as many elements as a tensor says."""
    return name in ("__getitem__", "__setitem__") and any(x.dtype is torch.bool for x in _flat(args[1]))


def _mapped(x: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        values = [_mapped(one, change) for one in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    return {key: _mapped(one, change) for key, one in x.items()} if isinstance(x, dict) else x


def _flat(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _flat(part)]
