"""Build the target and the draft from a checkpoint: every parameter is written once, every tensor is consumed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nextn.checkpoint.dummy import fill_dummy
from nextn.checkpoint.hub import resolve_model
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.report import LoadReport, describe
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.errors import CheckpointError, QuantizationError
from nextn.layers.prepare import prepare_weights
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.quantization.detect import detect_quantization
from nextn.quantization.precedence import DraftQuantization, decide_draft_quantization
from nextn.quantization.scheme import QuantizationConfig
from nextn.quantization.tensors import CheckedQuantization

logger = logging.getLogger(__name__)

Model = Glm4MoeForCausalLM | Glm4MoeForCausalLMNextN


@dataclass(frozen=True)
class LoadedModel:
    model_config: ModelConfig
    target: Glm4MoeForCausalLM
    draft: Glm4MoeForCausalLMNextN | None
    report: LoadReport


@dataclass(frozen=True)
class _Source:
    """A checkpoint folder: its config, its declared quantization, and its tensors (None for dummy weights)."""

    folder: Path
    config: ModelConfig
    quantization: QuantizationConfig | None
    index: CheckpointIndex | None

    @classmethod
    def open(cls, name: str, *, dummy: bool) -> _Source:
        folder = resolve_model(name)
        config = ModelConfig.from_pretrained(folder)
        quantization = detect_quantization(folder, config.quantization_config)
        return cls(folder, config, quantization, None if dummy else CheckpointIndex.open(folder))

    @property
    def draft_prefix(self) -> str:
        return f"model.layers.{self.config.num_hidden_layers}."

    @property
    def dtypes(self) -> dict[str, str]:
        return self.index.dtypes if self.index is not None else {}


def load_model(
    engine_config: EngineConfig, *, device: torch.device, dtype: torch.dtype, want_draft: bool | None
) -> LoadedModel:
    """Load what the engine serves.

    dtype: computing type of the CPU; weights are expanded to it
    want_draft: True loads the NextN layer or stops, False leaves it out, None loads it where config.json names one
    Raises CheckpointError, QuantizationError or ConfigError, naming the tensor or field and the remedy.
    """
    dummy = engine_config.load_format == "dummy"
    source = _Source.open(engine_config.model_path, dummy=dummy)
    _check_method(source, engine_config.quantization)
    with device:
        target = Glm4MoeForCausalLM(source.config, CheckedQuantization(source.quantization, source.dtypes), dtype=dtype)
    draft_source = source
    if engine_config.draft_model_path is not None:
        draft_source = _Source.open(engine_config.draft_model_path, dummy=dummy)
        _check_fits(source.config, draft_source.config)
    if want_draft is None:
        want_draft = draft_source.config.num_nextn_predict_layers > 0
    draft, decision = None, None
    if want_draft:
        with device:
            draft, decision = _build_draft(draft_source, target, engine_config.draft_quantization, dtype)

    report = LoadReport(describe(target), describe(draft) if draft else (), decision.reason if decision else None)
    if source.index is None:
        for model in (target, draft):
            if model is not None:
                fill_dummy(model.weight_slots(), engine_config.random_seed)
    else:
        _fill(target, source.index, skip_prefix=source.draft_prefix)
        if draft is not None and draft_source.index is not None:
            _fill(draft, draft_source.index, only_prefix=draft_source.draft_prefix)
    for model in (target, draft):
        if model is not None:
            prepare_weights(model)
    return LoadedModel(source.config, target, draft, report)


def _build_draft(
    source: _Source, target: Glm4MoeForCausalLM, override: str | None, dtype: torch.dtype
) -> tuple[Glm4MoeForCausalLMNextN, DraftQuantization]:
    prefix = source.draft_prefix
    if source.config.num_nextn_predict_layers == 0:
        raise CheckpointError(
            f"{source.folder}: config.json names no NextN layer (num_nextn_predict_layers is 0), but "
            "drafting was asked for; pass --speculative-algorithm none, or --speculative-draft-model-path with a "
            "checkpoint that has one"
        )
    dtypes = {name: dtype_name for name, dtype_name in source.dtypes.items() if name.startswith(prefix)}
    if source.index is not None and not dtypes:
        raise CheckpointError(
            f"{source.folder}: config.json names a NextN layer, but no file has a tensor {prefix}*; download the "
            "missing file (often mtp.safetensors), or pass --speculative-algorithm none"
        )
    decision = decide_draft_quantization(source.quantization, override, dtypes)
    if decision.warning is not None:
        logger.warning("%s", decision.warning)
    draft = Glm4MoeForCausalLMNextN(
        source.config,
        decision.config,
        target=target,
        dtype=dtype,
        has_own_head=f"{prefix}shared_head.head.weight" in dtypes,
        has_own_embedding=f"{prefix}embed_tokens.weight" in dtypes,
    )
    return draft, decision


def _check_method(source: _Source, wanted: str | None) -> None:
    found = source.quantization.method if source.quantization is not None else "unquantized"
    if wanted is not None and wanted != found:
        raise QuantizationError(
            f"--quantization {wanted}: the checkpoint is {found}; leave the flag away to use {found}"
        )


def _check_fits(target: ModelConfig, draft: ModelConfig) -> None:
    for field in ("hidden_size", "vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim"):
        found, expected = getattr(draft, field), getattr(target, field)
        if found != expected:
            raise CheckpointError(
                f"--speculative-draft-model-path: {field}: found {found}, expected {expected} as in the target; "
                "take the NextN layer of a checkpoint of the same model"
            )


def _fill(model: Model, index: CheckpointIndex, *, skip_prefix: str = "\0", only_prefix: str = "") -> None:
    """Copy every tensor of the model's layers into its slot.

    skip_prefix, only_prefix: which of the checkpoint's tensors are this model's to consume
    """
    slots = dict(model.weight_slots())
    mine = {name for name in index.tensors if name.startswith(only_prefix) and not name.startswith(skip_prefix)}
    missing = [name for name in slots if name not in index.tensors]
    if missing:
        raise CheckpointError(f"{index.folder}: {_some(missing)} missing; download the checkpoint again")
    unread = mine - slots.keys() - model.redundant_names()
    if unread:
        raise CheckpointError(
            f"{index.folder}: {_some(sorted(unread))} in the checkpoint, but nothing in the model takes them; the "
            "config or the quantization config does not describe this checkpoint"
        )
    with index.reader() as read:
        for name, view in slots.items():
            _copy(name, read(name), view)


def _copy(name: str, tensor: torch.Tensor, view: torch.Tensor) -> None:
    is_code = tensor.dtype == torch.float8_e4m3fn
    if is_code != (view.dtype == torch.float8_e4m3fn) or not tensor.dtype.is_floating_point:
        raise CheckpointError(
            f"{name}: found {tensor.dtype}, expected {view.dtype}; FP8 codes without their scale are not numbers, so "
            "the quantization config must name this module as it is stored"
        )
    is_scale = name.endswith(("_scale", "_scale_inv"))
    if is_scale and tensor.numel() == view.numel() == 1:
        tensor = tensor.view(view.shape)
    if is_scale and view.dim() == 2 and view.shape[1] == 1 and tensor.shape == view.shape[:1]:
        tensor = tensor[:, None]
    if tensor.shape != view.shape:
        raise CheckpointError(
            f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(view.shape)} from config.json"
        )
    if is_scale and not bool((torch.isfinite(tensor.float()) & (tensor.float() > 0)).all()):
        raise CheckpointError(
            f"{name}: holds a scale that is zero, negative, infinite or NaN; quantize the checkpoint again"
        )
    view.copy_(tensor)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:3])
    return (
        f"{shown} is" if len(listed) == 1 else f"{shown}{', …' if len(listed) > 3 else ''} ({len(listed)} tensors) are"
    )
