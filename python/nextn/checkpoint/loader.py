"""Build the target and the draft from a checkpoint: every parameter is written once, every tensor is consumed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from nextn.checkpoint.dummy import fill_dummy
from nextn.checkpoint.index import CheckpointIndex, TensorReader
from nextn.checkpoint.layout import SCALES, ExpectedTensor, Layout
from nextn.checkpoint.plan import DraftPlan, LoadPlan, check_values, make_plan
from nextn.checkpoint.report import LoadReport
from nextn.checkpoint.values import all_zero, check_finite, check_scale, may_be_zero
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.errors import ConfigError
from nextn.kernels.fp8_dequantize import dequantize
from nextn.layers.prepare import prepare_weights
from nextn.layers.storage import WHOLE, Part
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN

logger = logging.getLogger(__name__)

PROGRESS_BYTES = 2**30
"""From this size on, loading shows how far it is."""

Model = Glm4MoeForCausalLM | Glm4MoeForCausalLMNextN


@dataclass(frozen=True)
class LoadedModel:
    model_config: ModelConfig
    target: Glm4MoeForCausalLM
    draft: Glm4MoeForCausalLMNextN | None
    report: LoadReport


def load_model(
    engine_config: EngineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    want_draft: bool | None,
    tp: TensorParallel = SINGLE,
) -> LoadedModel:
    """Load what the engine serves, or this rank's part of it. What is checked and reported is the whole.

    dtype: computing type; on a CPU weights are expanded to it, on a GPU they stay as they are stored
    want_draft: True loads the NextN layer or stops, False leaves it out, None loads it where config.json names one
    Raises CheckpointError, QuantizationError or ConfigError, naming the tensor or field and the remedy.
    """
    plan = make_plan(engine_config, want_draft=want_draft)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    check_values(plan)
    if device.type == "cpu":
        _check_memory(plan, dtype, tp)
    with device:
        target = Glm4MoeForCausalLM(plan.source.config, plan.quantization, dtype=dtype, tp=tp)
        draft = _build_draft(plan.draft, target, dtype, tp) if plan.draft is not None else None
    _fill(target, plan.source.index, plan.layout, engine_config.random_seed, show=tp.is_first)
    if plan.draft is not None and draft is not None:
        _fill(draft, plan.draft.source.index, plan.draft.layout, engine_config.random_seed)
    for model in (target, draft):
        if model is not None:
            prepare_weights(model, batch_invariant=engine_config.batch_invariant)
    return LoadedModel(plan.source.config, target, draft, plan.report)


def _check_memory(plan: LoadPlan, dtype: torch.dtype, tp: TensorParallel) -> None:
    """Raises ConfigError if the machine's memory could not hold the weights in the computing type.

    Without this a process that fills the memory would be killed, and could not say why.
    """
    layouts = [plan.layout, *([plan.draft.layout] if plan.draft is not None else [])]
    num_values = sum(math.prod(tensor.shape) for layout in layouts for tensor in layout.tensors())
    needed = num_values * dtype.itemsize * tp.ranks_per_node // tp.size
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > most:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"--device cpu: the weights take {needed / 2**30:.1f} GiB in {name}, and this machine has "
            f"{most / 2**30:.1f} GiB of memory; use GPUs, a machine with more memory, or more of them with --nnodes"
        )


def _build_draft(
    plan: DraftPlan, target: Glm4MoeForCausalLM, dtype: torch.dtype, tp: TensorParallel
) -> Glm4MoeForCausalLMNextN:
    return Glm4MoeForCausalLMNextN(
        plan.config,
        plan.decision.config,
        target=target,
        dtype=dtype,
        has_own_head=plan.has_own_head,
        has_own_embedding=plan.has_own_embedding,
        has_fp8_head=plan.has_fp8_head,
        tp=tp,
    )


def _fill(model: Model, index: CheckpointIndex | None, layout: Layout, seed: int, *, show: bool = False) -> None:
    """Write every slot of the model: from the files, which the layout was checked against, or with random values.

    show: how far it is, where that takes a while
    """
    if index is None:
        fill_dummy(model.weight_slots(), seed)
        return
    expected = {tensor.name: tensor for tensor in layout.tensors()}
    unwritten = dict(expected)
    slots = sorted(model.weight_slots(), key=lambda slot: index.tensors[slot.name].file.name)  # one file after another
    num_bytes = sum(slot.view.nbytes for slot in slots)
    written = _Written()
    bar = _progress(show and num_bytes >= PROGRESS_BYTES)
    task = bar.add_task("loading", total=num_bytes)
    with index.reader() as read, bar:
        for name, view, part in slots:
            tensor = unwritten.pop(name)
            if tensor.scheme.is_quantized and tensor.role == "weight" and view.dtype != torch.float8_e4m3fn:
                view.copy_(part.of(_dequantized(tensor, expected, unwritten, read)))
            else:
                view.copy_(_read(tensor, read, part).view(view.shape))
            if tensor.role not in SCALES and not may_be_zero(tensor) and view.numel():
                written.look(name, view)
            bar.advance(task, view.nbytes)
    written.check()
    assert not unwritten, f"the model has no slot for {next(iter(unwritten))}"


class _Written:
    """The extremes of what was written, kept on its device until all are read at once: no copy is waited for."""

    def __init__(self) -> None:
        self._names: dict[torch.dtype, list[str]] = {}
        self._extremes: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def look(self, name: str, view: torch.Tensor) -> None:
        """Of FP8 the codes: read as signed, the largest is NaN; read as unsigned, negative NaN."""
        if view.dtype == torch.float8_e4m3fn:
            extremes = view.view(torch.int8).amax(), view.view(torch.uint8).amax()
        else:
            extremes = torch.aminmax(view)
        self._names.setdefault(view.dtype, []).append(name)
        self._extremes.setdefault(view.dtype, []).append(extremes)

    def check(self) -> None:
        """Raises CheckpointError if a tensor holds NaN, infinite values, or nothing but zeros."""
        for dtype, extremes in self._extremes.items():
            first, second = (torch.stack(column).double().cpu() for column in zip(*extremes, strict=True))
            if dtype == torch.float8_e4m3fn:
                first, second = (
                    values.masked_fill(values == nan, math.nan) for values, nan in ((first, 127), (second, 255))
                )
            for name, pair in zip(self._names[dtype], torch.stack((first, second), 1), strict=True):
                if dtype != torch.float16:  # what is too large for that is told after the first prompt
                    check_finite(name, pair.numpy())
                if not pair.any():
                    raise all_zero(name)


def _progress(is_shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not is_shown)


def _dequantized(
    tensor: ExpectedTensor,
    expected: Mapping[str, ExpectedTensor],
    unwritten: dict[str, ExpectedTensor],
    read: TensorReader,
) -> torch.Tensor:
    """weight × scale in float32. Its scales count as written: an input's has no use without FP8 products."""
    module = tensor.name.removesuffix(".weight")
    if (input_scale := f"{module}.input_scale") in expected:
        _read(unwritten.pop(input_scale), read)
    scale = _read(unwritten.pop(f"{module}.{tensor.scheme.scale_suffix}"), read).float()
    return dequantize(_read(tensor, read), scale if scale.dim() == 2 else scale.view(-1, 1), tensor.scheme.block)


def _read(tensor: ExpectedTensor, read: TensorReader, part: Part = WHOLE) -> torch.Tensor:
    """The tensor, or a part of it, as stored. Raises CheckpointError if it is a scale that cannot scale."""
    found = read(tensor.name, part.rows, part.columns)
    if tensor.role in SCALES:
        check_scale(tensor.name, found.float().numpy())
    return found
