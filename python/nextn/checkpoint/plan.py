"""Everything that loading decides before it reads a weight: from the configs and the files' headers alone.

The loader carries a plan out and the doctor explains it; what can be refused without reading weights is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from nextn.checkpoint.fit import check_fit
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.layout import EMBEDDING, HEAD, Layout, nextn_layout, target_layout
from nextn.checkpoint.report import LoadReport, report_draft, report_target
from nextn.checkpoint.source import Source
from nextn.checkpoint.values import check_alike, check_biases, check_norms, check_tied_head, check_weights
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.errors import CheckpointError, ConfigError, QuantizationError
from nextn.quantization.precedence import DraftQuantization, decide_draft_quantization
from nextn.quantization.tensors import FP8_DTYPE, CheckedQuantization
from nextn.quantization.undeclared import config_of_tensors, remedy

MUST_FIT = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "partial_rotary_factor",
    "rope_theta",
)
"""What a NextN layer must share with a target: the tensors that meet, the layer's index, the KV pool, the positions."""


@dataclass(frozen=True)
class DraftPlan:
    """config: of the checkpoint the layer comes from, with the target's context length.

    has_fp8_head: whether the head is quantized once loaded, for drafting alone
    """

    source: Source
    config: ModelConfig
    decision: DraftQuantization
    layout: Layout
    has_own_head: bool
    has_own_embedding: bool
    has_fp8_head: bool


@dataclass(frozen=True)
class LoadPlan:
    """warnings: for the log, where a person may have meant something else."""

    source: Source
    quantization: CheckedQuantization
    layout: Layout
    draft: DraftPlan | None
    report: LoadReport
    warnings: tuple[str, ...]


def make_plan(engine_config: EngineConfig, *, want_draft: bool | None) -> LoadPlan:
    """Decide what is loaded, how, and whether it can be.

    want_draft: True loads the NextN layer or stops, False leaves it out, None loads it where config.json names one
    Raises CheckpointError, QuantizationError or ConfigError, naming the tensor or field and the remedy.
    """
    dummy = engine_config.load_format == "dummy"
    source = Source.open(engine_config.model_path, flag="--model-path", dummy=dummy)
    source = _in_method(source, engine_config.quantization)
    _check_context(source, engine_config.context_length)
    flag = f"--quantization {engine_config.quantization}" if engine_config.quantization else None
    quantization = CheckedQuantization(
        source.quantization,
        source.dtypes,
        undeclared=partial(remedy, source.target_tensors, "--quantization"),
        decided_by=flag,
    )
    layout = target_layout(source.config, quantization)
    draft_source = source
    if engine_config.draft_model_path is not None:
        draft_source = Source.open(
            engine_config.draft_model_path, flag="--speculative-draft-model-path", dummy=dummy, has_target=False
        )
        _check_fits(source.config, draft_source)
    if want_draft is None:
        want_draft = draft_source.config.num_nextn_predict_layers > 0
    draft = _plan_draft(draft_source, source.config, engine_config) if want_draft else None
    if source.index is not None:
        _check_target_files(source, layout)
    if draft is not None and draft_source.index is not None:
        check_fit(draft_source.index, draft.layout, draft_source.draft_tensors.keys())
    report = LoadReport(
        report_target(source, layout),
        report_draft(draft_source, draft.layout, source, has_fp8_head=draft.has_fp8_head) if draft is not None else (),
        draft.decision.reason if draft is not None else None,
        str(draft_source.folder) if draft is not None and draft_source is not source else None,
    )
    return LoadPlan(source, quantization, layout, draft, report, tuple(_warnings(draft_source, draft)))


def check_values(plan: LoadPlan, *, all_shards: bool = False) -> None:
    """What headers cannot tell, as far as little reading shows it: norms, biases, rows of weights, a head that is tied.

    all_shards: read of every expert of the target, not of one in each layer
    Raises CheckpointError naming the tensor and the remedy.
    """
    source, draft = plan.source, plan.draft
    if source.index is None:
        return
    _check_values(source.index, plan.layout, all_shards=all_shards)
    if source.config.tie_word_embeddings:
        check_tied_head(source.index, HEAD, EMBEDDING)
    if draft is not None and draft.source.index is not None:
        _check_values(draft.source.index, draft.layout, all_shards=True)
        for name, is_own in ((EMBEDDING, draft.has_own_embedding), (HEAD, draft.has_own_head)):
            if not is_own and draft.source is not source:
                check_alike(draft.source.index, source.index, name)


def _check_values(index: CheckpointIndex, layout: Layout, *, all_shards: bool) -> None:
    check_norms(index, layout)
    check_biases(index, layout)
    check_weights(index, layout, all_shards=all_shards)


def _check_target_files(source: Source, layout: Layout) -> None:
    assert source.index is not None, "only for checkpoints with weights"
    tied = {HEAD} if source.config.tie_word_embeddings else set()
    check_fit(source.index, layout, source.target_tensors.keys() - tied)


def _plan_draft(source: Source, target: ModelConfig, engine_config: EngineConfig) -> DraftPlan:
    prefix, tensors = source.draft_prefix, source.draft_tensors
    if source.config.num_nextn_predict_layers == 0:
        has_layer = f", although the files have {len(tensors)} tensors {prefix}*" if tensors else ""
        raise CheckpointError(
            f"{source.folder}: config.json names no NextN layer (num_nextn_predict_layers is 0{has_layer}), but "
            "drafting was asked for; pass --speculative-algorithm none, or --speculative-draft-model-path with a "
            "checkpoint that has one"
        )
    if source.index is not None and not tensors:
        raise CheckpointError(
            f"{source.folder}: config.json names a NextN layer, but no file has a tensor {prefix}*; download the "
            "missing file (often mtp.safetensors), or pass --speculative-algorithm none"
        )
    stored = tensors if source.index is not None else None
    decision = decide_draft_quantization(source.quantization, engine_config.draft_quantization, stored)
    config = replace(source.config, max_position_embeddings=target.max_position_embeddings)
    has_own_head = f"{prefix}shared_head.head.weight" in tensors
    has_own_embedding = f"{prefix}embed_tokens.weight" in tensors
    if not has_own_head:
        _check_same(target, source, "tie_word_embeddings")
    layout = nextn_layout(config, decision.stored, has_own_head=has_own_head, has_own_embedding=has_own_embedding)
    has_fp8_head = engine_config.draft_head == "fp8" or (engine_config.draft_head == "auto" and decision.is_fp8)
    return DraftPlan(source, config, decision, layout, has_own_head, has_own_embedding, has_fp8_head)


def _in_method(source: Source, wanted: str | None) -> Source:
    """The source itself, or with the quantization that the flag names where config.json declares none of FP8 tensors.

    Raises QuantizationError if the checkpoint is in another method.
    """
    if wanted is None:
        return source
    declared, tensors = source.quantization, source.target_tensors
    if declared is None and any(info.dtype == FP8_DTYPE for info in tensors.values()):
        source = replace(
            source, quantization=config_of_tensors(tensors, wanted, f"--quantization {wanted}", "the checkpoint")
        )
    found = source.quantization.method if source.quantization is not None else "unquantized"
    if wanted != found:
        is_found = declared is source.quantization
        instead = f"leave the flag out to use {found}" if is_found else f"pass {found}, which config.json leaves out"
        raise QuantizationError(f"--quantization {wanted}: the checkpoint is {found}; {instead}")
    return source


def _check_context(source: Source, wanted: int | None) -> None:
    most = source.config.max_position_embeddings
    if wanted is not None and wanted > most:
        raise ConfigError(
            f"--context-length: found {wanted}, expected at most {most}, the max_position_embeddings of "
            f"{source.folder}/config.json; lower it, or leave the flag out for all of them"
        )


def _check_fits(target: ModelConfig, draft: Source) -> None:
    for field in MUST_FIT:
        _check_same(target, draft, field)


def _check_same(target: ModelConfig, draft: Source, field: str) -> None:
    found, expected = getattr(draft.config, field), getattr(target, field)
    if found != expected:
        raise CheckpointError(
            f"--speculative-draft-model-path {draft.folder}: {field}: found {found}, expected {expected} as in the "
            "target; take the NextN layer of a checkpoint of the same model"
        )


def _warnings(source: Source, draft: DraftPlan | None) -> list[str]:
    if draft is not None:
        return [draft.decision.warning] if draft.decision.warning is not None else []
    if source.config.num_nextn_predict_layers == 0 and source.draft_tensors:
        return [
            f"{source.folder}: the files have a NextN layer ({len(source.draft_tensors)} tensors "
            f"{source.draft_prefix}*), but config.json says num_nextn_predict_layers 0, so nothing drafts; set it to 1"
        ]
    return []
