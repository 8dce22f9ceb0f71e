"""A model's layout against the headers of the files: every tensor is there once, fits, and is taken by something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from nextn.checkpoint.header import TensorInfo
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.layout import SCALES, ExpectedTensor, Layout
from nextn.config.model_config import ModelConfig
from nextn.errors import CheckpointError
from nextn.quantization.tensors import FP8_DTYPE

FLOATS = ("BF16", "F16", "F32", "F64")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_SCALE = re.compile(r".*(scale|scale_inv|zero_point)$")


def check_extent(index: CheckpointIndex, config: ModelConfig) -> None:
    """The files have as many layers and experts as config.json says, which bounds what a layout of them takes.

    Raises CheckpointError with both numbers.
    """
    numbers = {int(match[1]) for name in index.tensors if (match := _LAYER.match(name))}
    found = next(i for i in range(len(numbers) + 1) if i not in numbers)
    if config.num_hidden_layers > found:
        raise CheckpointError(
            f"{index.folder}: no file has a tensor model.layers.{found}.*, expected {config.num_hidden_layers} layers "
            "as in config.json (num_hidden_layers); download the checkpoint again"
        )
    moe_layer = config.first_k_dense_replace
    last = f"model.layers.{moe_layer}.mlp.experts.{config.n_routed_experts - 1}."
    if moe_layer < config.num_hidden_layers and not any(name.startswith(last) for name in index.tensors):
        raise CheckpointError(
            f"{index.folder}: no file has a tensor {last}*, expected {config.n_routed_experts} experts as in "
            "config.json (n_routed_experts); download the checkpoint again, or correct the config"
        )


def check_fit(index: CheckpointIndex, layout: Layout, mine: Set[str]) -> None:
    """Every tensor of the layout is in the files with its shape and a fitting type, and nothing else is in ``mine``.

    mine: the checkpoint's tensors that this model has to take, each one
    Raises CheckpointError naming the tensor, what was found, expected, and what to do.
    """
    expected = {tensor.name: tensor for tensor in layout.tensors()}
    missing = [name for name in expected if name not in index.tensors]
    if missing:
        raise CheckpointError(f"{index.folder}: {_some(missing)} missing; download the checkpoint again")
    _check_nothing_unread(index, sorted(mine - expected.keys()))
    for tensor in expected.values():
        _check_dtype(tensor, index.tensors[tensor.name])
        _check_shape(tensor, index.tensors[tensor.name])


def _check_nothing_unread(index: CheckpointIndex, unread: list[str]) -> None:
    others = set(unread)
    scales = [name for name in unread if _SCALE.match(name) and f"{name.rpartition('.')[0]}.weight" not in others]
    if scales:
        raise CheckpointError(
            f"{index.folder}: {_some(scales)} in the checkpoint, but nothing in the model would apply such a scale, "
            "and weights without their scale are garbage; the quantization config does not describe this checkpoint: "
            "correct it, or remove the scale"
        )
    if unread:
        raise CheckpointError(
            f"{index.folder}: {_some(unread)} in the checkpoint, but nothing in the model takes them; the config or "
            "the quantization config does not describe this checkpoint"
        )


def _check_dtype(tensor: ExpectedTensor, info: TensorInfo) -> None:
    if tensor.role == "weight" and tensor.scheme.is_quantized:
        assert info.dtype == FP8_DTYPE, "CheckedQuantization calls a module FP8 only if its tensor is"
        return
    if info.dtype in FLOATS:
        return
    if info.dtype.startswith("F8_") and tensor.role not in SCALES:
        raise CheckpointError(
            f"{tensor.name}: found {info.dtype}, expected one of {', '.join(FLOATS)}; FP8 codes without their scale "
            "are not numbers, and nothing would scale these: store this tensor unquantized"
        )
    raise CheckpointError(f"{tensor.name}: found {info.dtype}, expected one of {', '.join(FLOATS)}; store it as such")


def _check_shape(tensor: ExpectedTensor, info: TensorInfo) -> None:
    if info.shape == tensor.shape:
        return
    found = f"{tensor.name}: found shape {info.shape}, expected {tensor.shape}"
    if tensor.role in SCALES:
        if info.num_elements == 1 and not tensor.shape:
            return
        if len(tensor.shape) == 2 and tensor.shape[1] == 1 and info.shape == tensor.shape[:1]:
            return
        expected = "of one element" if not tensor.shape else str(tensor.shape)
        raise CheckpointError(
            f"{tensor.name}: found shape {info.shape}, expected {expected}, as {tensor.scheme.kind} has it "
            f"({tensor.scheme.source}); correct the quantization config, or quantize the checkpoint again"
        )
    if tensor.kind == "eh_proj":
        raise CheckpointError(
            f"{found}: it takes the embedding and the hidden state side by side, 2 x hidden_size columns; the NextN "
            "layer is of another model"
        )
    raise CheckpointError(f"{found} from config.json; correct the config, or download the checkpoint again")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:3])
    return (
        f"{shown} is" if len(listed) == 1 else f"{shown}{', …' if len(listed) > 3 else ''} ({len(listed)} tensors) are"
    )
