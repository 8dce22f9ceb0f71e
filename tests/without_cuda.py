"""A GPU's tensors where there is no GPU: what torch's fake tensors lack to go through the engine on a CPU build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_BY_NAME = {
    torch.Tensor.copy_: torch.ops.aten.copy_,
    torch.Tensor.contiguous: torch.ops.aten.contiguous,
}


class WithoutCuda(TorchFunctionMode):
    """x[...] and copies by operations: torch's own way to them asks for a CUDA build."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            return _index(*args)
        if func is torch.Tensor.__setitem__:
            tensor, index, value = args
            if isinstance(index, torch.Tensor):
                return torch.ops.aten.index_put_(tensor, [index], value)
            place = _index(tensor, index)
            if isinstance(value, torch.Tensor):
                return torch.ops.aten.copy_(place, value)
            return torch.ops.aten.fill_(place, value)
        options = dict(kwargs or {})
        options.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.tensor and options.get("device") is not None:
            device = options.pop("device")
            return torch.ops.aten._to_copy(func(*args, **options), device=device)
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.device):
            return torch.ops.aten._to_copy(args[0], device=args[1])
        return _BY_NAME.get(func, func)(*args, **options)


def _index(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (tensor.dim() - sum(part is not None for part in parts) + 1)
    advanced: list[torch.Tensor | None] = []
    dim = 0
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        elif isinstance(part, slice):
            first, stop, step = part.indices(tensor.shape[dim])
            assert step == 1, "no other is used"
            tensor = tensor.narrow(dim, first, max(stop - first, 0))
        else:
            advanced += [None] * (dim - len(advanced))
            is_list = not isinstance(part, torch.Tensor)
            advanced.append(torch.ops.aten._to_copy(torch.tensor(part), device=tensor.device) if is_list else part)
        dim += 1
    return torch.ops.aten.index(tensor, advanced) if advanced else tensor


class AllZero(TorchFunctionMode):
    """What the host asks of a tensor without values is zero."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.tolist:
            return _zeros(args[0].shape)
        if func in (torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.item):
            return 0
        return func(*args, **(kwargs or {}))


def _zeros(shape: torch.Size) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0
