"""The examination itself: the loader's own plan is made, and what it says is put into words and numbers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nextn.checkpoint.hub import resolve_draft, resolve_model
from nextn.checkpoint.hub_headers import folder_with_headers
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.layout import SCALES, Layout
from nextn.checkpoint.plan import LoadPlan, check_values, make_plan
from nextn.checkpoint.report import LoadReport
from nextn.checkpoint.values import check_norms, check_scales
from nextn.config.engine_config import EngineConfig
from nextn.demo import checkpoint_dir
from nextn.diagnosis.memory import GpuMemory, memory_by_tp
from nextn.diagnosis.options import DoctorOptions
from nextn.diagnosis.pitfalls import Pitfall, find_pitfalls
from nextn.errors import NextnError
from nextn.quantization.experts import why_not_on_gpu

FINE, DRAFTS_BADLY, REFUSED = 0, 1, 2
GB = 10**9

Depth = Literal["headers", "headers and values"]

_PRECISION = {
    "fp8_channel": "FP8, a scale per output channel",
    "fp8_tensor": "FP8, a scale per tensor",
    "fp8_block": "FP8, a scale per block",
    "unquantized": "unquantized",
}


@dataclass(frozen=True)
class ModelFacts:
    """parameters: of the target, scales not counted; draft_parameters: of the NextN layer; stored_bytes: of both.

    context_length: max_position_embeddings of config.json
    """

    folder: str
    num_layers: int
    num_experts: int
    context_length: int
    quantization: str
    parameters: int
    draft_parameters: int
    stored_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """exit_code: 0 fine, 1 serves but does not draft well, 2 the server would refuse it, on GPUs at least

    refusal: the loader's own error; gpu_refusal: the server's on every GPU, of what it serves on a CPU;
        serves_without_draft: for what is refused, whether `--speculative-algorithm none` would serve it
    serves: on a CPU at least
    drafts: whether the NextN layer will draft; precision, reason: how and why, or why it will not
    depth: what was read; concerns: what speaks against a good draft; warnings: the loader's
    min_gpus: smallest tensor-parallel size that fits and falls inside no block; None if none does
    command: what to type
    """

    checkpoint: str
    exit_code: int
    depth: Depth
    refusal: str | None = None
    gpu_refusal: str | None = None
    serves_without_draft: bool | None = None
    serves: bool = False
    drafts: bool = False
    precision: str | None = None
    reason: str | None = None
    concerns: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    model: ModelFacts | None = None
    report: LoadReport | None = None
    gpu_gb: float = 0.0
    memory: tuple[GpuMemory, ...] = ()
    pitfalls: tuple[Pitfall, ...] = ()
    min_gpus: int | None = None
    command: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(options: DoctorOptions) -> Diagnosis:
    """Never raises for anything a checkpoint can contain: what the loader refuses is a refusal in the answer."""
    name = options.checkpoint if options.checkpoint is not None else str(checkpoint_dir())
    depth: Depth = "headers and values" if options.deep else "headers"
    try:
        with ExitStack() as folders:
            return _examine(name, _engine_config(options, name, folders), options, depth)
    except NextnError as error:
        return Diagnosis(name, REFUSED, depth, refusal=str(error))


def _engine_config(options: DoctorOptions, name: str, folders: ExitStack) -> EngineConfig:
    """The server's, with folders in place of names: values are read from whole checkpoints, headers are enough else."""

    def folder(name: str, flag: str, resolve: Callable[[str, str], Path]) -> str:
        return str(resolve(name, flag) if options.deep else folders.enter_context(folder_with_headers(name, flag)))

    config = options.engine_config(folder(name, "CHECKPOINT", resolve_model))
    if (draft := config.draft_model_path) is None:
        return config
    return replace(config, draft_model_path=folder(draft, "--speculative-draft-model-path", resolve_draft))


def _examine(name: str, config: EngineConfig, options: DoctorOptions, depth: Depth) -> Diagnosis:
    try:
        plan = make_plan(config, want_draft=config.wants_draft)
        concerns = _read_values(plan) if options.deep else ()
    except NextnError as error:
        without = _serves_without_draft(config, options.deep)
        return Diagnosis(name, REFUSED, depth, refusal=str(error), serves_without_draft=without)
    concerns = (*concerns, *_no_draft(plan, config))
    of_target, of_draft = _refusal_on_gpus(plan.layout), None
    if plan.draft is not None and plan.draft.decision.config is plan.draft.decision.stored:
        of_draft = _refusal_on_gpus(plan.draft.layout)
    gpu_refusal = of_target or of_draft
    memory = memory_by_tp(plan, options.gpu_gb * GB, config.page_size) if gpu_refusal is None else ()
    min_gpus = next((one.tp_size for one in memory if one.fits), None)
    return Diagnosis(
        name,
        REFUSED if gpu_refusal is not None else DRAFTS_BADLY if concerns else FINE,
        depth,
        gpu_refusal=gpu_refusal,
        serves_without_draft=None if of_draft is None else of_target is None,
        serves=True,
        drafts=plan.draft is not None,
        precision=_precision(plan),
        reason=plan.report.draft_reason,
        concerns=concerns,
        warnings=plan.warnings,
        model=_facts(plan),
        report=plan.report,
        gpu_gb=options.gpu_gb,
        memory=memory,
        pitfalls=find_pitfalls(plan, memory),
        min_gpus=min_gpus,
        command=_command(options, min_gpus, on_cpu=gpu_refusal is not None),
    )


def _read_values(plan: LoadPlan) -> tuple[str, ...]:
    """What the loader checks when it reads, without reading whole weights; and signs of a draft that was never trained.

    Raises CheckpointError as the loader would.
    """
    check_values(plan, all_shards=True)
    if plan.source.index is not None:
        check_scales(plan.source.index, plan.layout)
    draft = plan.draft
    if draft is None or draft.source.index is None:
        return ()
    check_scales(draft.source.index, draft.layout)
    norms = check_norms(draft.source.index, draft.layout)
    if any(one.spread > 0 or one.mean != 1 for one in norms):
        return ()
    return (
        f"every norm of the NextN layer is exactly 1 ({norms[0].name} and {len(norms) - 1} more), as before the first "
        "training step: its drafts will be accepted by chance only",
    )


def _serves_without_draft(config: EngineConfig, deep: bool) -> bool | None:
    """None where leaving the draft away changes nothing."""
    if config.wants_draft is False:
        return None
    try:
        plan = make_plan(replace(config, draft_model_path=None, draft_quantization=None), want_draft=False)
        if deep:
            _read_values(plan)
    except NextnError:
        return False
    return True


def _refusal_on_gpus(layout: Layout) -> str | None:
    """What the server says on a GPU of experts that its kernels do not take."""
    w13, w2 = ([one for one in layout.linears if one.kind == kind] for kind in ("experts.w13", "experts.w2"))
    reasons = (
        why_not_on_gpu(first.shards[0][0].removesuffix(".gate_proj"), first.scheme, second.scheme)
        for first, second in zip(w13, w2, strict=True)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _no_draft(plan: LoadPlan, config: EngineConfig) -> tuple[str, ...]:
    if plan.draft is not None:
        return ()
    if config.wants_draft is False:
        return ("drafting is switched off by --speculative-algorithm none",)
    return ("there is no NextN layer: config.json says num_nextn_predict_layers 0",)


def _precision(plan: LoadPlan) -> str | None:
    if plan.draft is None:
        return None
    if plan.draft.decision.config is not plan.draft.decision.stored:
        return "unquantized, expanded from FP8 on load"
    kinds = dict.fromkeys(linear.scheme.kind for linear in plan.draft.layout.linears if linear.kind != "eh_proj")
    return " and ".join(_PRECISION[kind] for kind in kinds)


def _facts(plan: LoadPlan) -> ModelFacts:
    config, draft = plan.source.config, plan.draft
    stored = _stored_bytes(plan.source.index, plan.layout)
    if draft is not None:
        stored += _stored_bytes(draft.source.index, draft.layout)
    return ModelFacts(
        str(plan.source.folder),
        config.num_hidden_layers,
        config.n_routed_experts,
        config.max_position_embeddings,
        plan.quantization.method,
        sum(_sizes(plan.layout)),
        sum(_sizes(draft.layout)) if draft is not None else 0,
        stored,
    )


def _sizes(layout: Layout) -> Iterator[int]:
    return (math.prod(tensor.shape) for tensor in layout.tensors() if tensor.role not in SCALES)


def _stored_bytes(index: CheckpointIndex | None, layout: Layout) -> int:
    return sum(index.tensors[tensor.name].num_bytes for tensor in layout.tensors()) if index is not None else 0


def _command(options: DoctorOptions, min_gpus: int | None, *, on_cpu: bool) -> str:
    """What starts the server, with a tensor-parallel size where one is needed. on_cpu: where GPUs refuse it"""
    words = ["python", "-m", "nextn.launch_server"]
    if options.checkpoint is not None:
        words += ["--model-path", options.checkpoint]
    for name, value in options.server.items():
        words += ["--" + name.replace("_", "-"), value]
    if min_gpus is not None and min_gpus > 1:
        words += ["--tp-size", str(min_gpus)]
    if on_cpu:
        words += ["--device", "cpu"]
    return shlex.join(words)
