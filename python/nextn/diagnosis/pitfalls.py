"""What other servers are known to get wrong with a checkpoint laid out like this one, without raising an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nextn.checkpoint.plan import LoadPlan
from nextn.diagnosis.memory import GpuMemory


@dataclass(frozen=True)
class Pitfall:
    """because: what of this checkpoint invites it; elsewhere: what happens there; here: what nextn does."""

    name: str
    because: str
    elsewhere: str
    here: str


@dataclass(frozen=True)
class _Layout:
    """The few facts of a plan that pitfalls turn on."""

    plan: LoadPlan
    memory: tuple[GpuMemory, ...]

    @property
    def prefix(self) -> str:
        return self.plan.source.draft_prefix

    @property
    def draft_schemes(self) -> dict[str, str]:
        """Kind of linear → scheme, of the NextN layer; empty without one."""
        draft = self.plan.draft
        return {} if draft is None else {linear.kind: linear.scheme.kind for linear in draft.layout.linears}

    @property
    def is_draft_fp8(self) -> bool:
        return any(kind != "unquantized" for kind in self.draft_schemes.values())

    @property
    def is_target_fp8(self) -> bool:
        return any(linear.scheme.is_quantized for linear in self.plan.layout.linears)

    @property
    def is_overridden(self) -> bool:
        return self.plan.draft is not None and self.plan.draft.decision.stored.decided_by is not None

    @property
    def is_dequantized(self) -> bool:
        return self.plan.draft is not None and self.plan.draft.decision.config is not self.plan.draft.decision.stored


def find_pitfalls(plan: LoadPlan, memory: tuple[GpuMemory, ...]) -> tuple[Pitfall, ...]:
    layout = _Layout(plan, memory)
    return tuple(pitfall for find in _ALL if (pitfall := find(layout)) is not None)


def _config_dropped(layout: _Layout) -> Pitfall | None:
    if not layout.is_draft_fp8 or layout.is_overridden:
        return None
    return Pitfall(
        "draft config dropped",
        "the NextN layer is FP8, and the format is detected in config.json, so no flag names it",
        "a draft that keeps its quantization config only when a flag names one is built of BF16 linears: FP8 codes are "
        "copied in raw, weight_scale is skipped as unknown. Accept length falls from 2 to 1.0, and throughput below "
        "that without drafts (62 instead of 122 tok/s at batch 1, GLM-4.6-FP8 on 8 GPUs). There, name the draft's "
        "quantization by flag, and look at the accept length",
        "the detected config is kept; FP8 codes without their scales stop the server",
    )


def _config_forced(layout: _Layout) -> Pitfall | None:
    if not layout.is_target_fp8 or layout.plan.draft is None or layout.is_draft_fp8:
        return None
    return Pitfall(
        "target's FP8 forced on the draft",
        "the target is FP8, the NextN layer is not",
        "a draft that takes the target's config over waits for scales that the files do not have, and multiplies by "
        "whatever was in memory",
        "decided per module, and checked against the tensors",
    )


def _partly_quantized(layout: _Layout) -> Pitfall | None:
    draft = layout.plan.draft
    if draft is None or not layout.is_draft_fp8:
        return None
    entries = [linear for linear in draft.layout.linears if " entry " in linear.scheme.source]
    if not entries:
        return None
    return Pitfall(
        "ignore list not matched",
        f"the ignore list excludes parts of the NextN layer by checkpoint names ({layout.prefix}{entries[0].kind})",
        "servers rename the layer at run time (model.decoder…, mtp_block…); entries then match nothing, and "
        f"{entries[0].kind} is taken for FP8",
        "entries are matched against checkpoint names; one that names nothing is refused",
    )


def _quantized_eh_proj(layout: _Layout) -> Pitfall | None:
    if layout.draft_schemes.get("eh_proj", "unquantized") == "unquantized":
        return None
    return Pitfall(
        "eh_proj read raw",
        "eh_proj, which joins embedding and hidden state, is FP8; official checkpoints keep it in BF16",
        "servers build eh_proj without a quantization config and copy its codes in raw",
        "it is a linear like every other, with its scale",
    )


def _borrowed(layout: _Layout) -> Pitfall | None:
    draft = layout.plan.draft
    if draft is None:
        return None
    parts = (("embed_tokens", draft.has_own_embedding), ("shared_head.head", draft.has_own_head))
    missing = [name for name, is_own in parts if not is_own]
    if not missing:
        return None
    return Pitfall(
        "random head or embedding",
        f"the NextN layer has no {' and no '.join(missing)} (GLM-4.6 and 4.7 ship neither)",
        "servers that allocate them for the draft and wait for tensors leave them at random values",
        "the target's are used, and the load report says so",
    )


def _unlisted(layout: _Layout) -> Pitfall | None:
    draft = layout.plan.draft
    index = draft.source.index if draft is not None else layout.plan.source.index
    if index is None or not index.unlisted:
        return None
    return Pitfall(
        "file outside the index",
        f"{', '.join(index.unlisted)} is not named in model.safetensors.index.json",
        "loaders that go by the index never open it, so the NextN layer stays uninitialised",
        "every safetensors file of the folder is read",
    )


def _unnamed(layout: _Layout) -> Pitfall | None:
    source = layout.plan.source
    if layout.plan.draft is not None or source.config.num_nextn_predict_layers or not source.draft_tensors:
        return None
    return Pitfall(
        "NextN layer not named",
        f"the files have {layout.prefix}*, but config.json says num_nextn_predict_layers 0",
        "the layer is skipped as unknown tensors, and nothing drafts",
        "the same, but said; set num_nextn_predict_layers to 1",
    )


def _unquant(layout: _Layout) -> Pitfall | None:
    if not layout.is_dequantized:
        return None
    return Pitfall(
        "unquant does nothing",
        "the draft's FP8 is overridden to unquantized",
        "in some versions the override is accepted and ignored, or casts the codes without their scales",
        "weight x scale, once, on load",
    )


def _other_checkpoint(layout: _Layout) -> Pitfall | None:
    draft = layout.plan.draft
    if draft is None or draft.source is layout.plan.source:
        return None
    return Pitfall(
        "layer of another model",
        f"the NextN layer is taken from {draft.source.folder}",
        "a layer of the same shapes but another model or quantization is loaded without a word",
        "its sizes, positions and quantization are checked against both; that it was trained on these hidden states is "
        "yours to know",
    )


def _blocks(layout: _Layout) -> Pitfall | None:
    uneven = next((one for one in layout.memory if one.uneven), None)
    if uneven is None:
        return None
    return Pitfall(
        "blocks cut by tensor parallelism",
        f"at {uneven.tp_size} GPUs {uneven.uneven[0]}",
        "servers refuse at start, or give a shard the scales of its neighbour's block",
        "blocks stay whole: some GPUs hold one more than others, and the largest share sets memory and pace",
    )


def _mixed_dtypes(layout: _Layout) -> Pitfall | None:
    index = layout.plan.source.index
    biases = [t.name for t in layout.plan.layout.others if t.kind == "router bias"]
    if index is None or layout.plan.source.config.dtype == "float32":
        return None
    if not biases or any(index.tensors[name].dtype != "F32" for name in biases):
        return None
    return Pitfall(
        "router bias rounded",
        f"e_score_correction_bias is float32 beside {layout.plan.source.config.dtype} weights",
        "servers that cast the whole model to one type round it, and other experts are chosen",
        "types are kept per tensor; the router computes in float32",
    )


_ALL: tuple[Callable[[_Layout], Pitfall | None], ...] = (
    _config_dropped,
    _config_forced,
    _partly_quantized,
    _quantized_eh_proj,
    _borrowed,
    _unlisted,
    _unnamed,
    _unquant,
    _other_checkpoint,
    _blocks,
    _mixed_dtypes,
)
