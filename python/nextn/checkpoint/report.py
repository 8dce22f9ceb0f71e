"""What loading decided, per kind of module: for the log, for /get_server_info, for a bug report."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from nextn.layers.linear import Linear
from nextn.layers.moe import Experts
from nextn.layers.storage import ScaleStorage
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.quantization.scheme import LinearScheme


@dataclass(frozen=True)
class ModuleReport:
    """Modules of one kind that were decided alike.

    kind: "qkv_proj", "experts.w13", …
    dtype: of the weights as stored; scale_shape: of one module's scales, None without
    source: where the decision came from
    """

    kind: str
    scheme: str
    dtype: str
    scale_shape: tuple[int, ...] | None
    count: int
    source: str


@dataclass(frozen=True)
class LoadReport:
    """draft_reason: how the draft's quantization was decided; None without a draft."""

    target: tuple[ModuleReport, ...]
    draft: tuple[ModuleReport, ...]
    draft_reason: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_table(self) -> str:
        """A short table for the log."""
        lines = [f"{'module':<22}{'scheme':<14}{'dtype':<16}{'scales':<14}{'count':>5}  decided by"]
        for title, modules in (("", self.target), ("draft ", self.draft)):
            for m in modules:
                shape = "-" if m.scale_shape is None else "x".join(map(str, m.scale_shape))
                lines.append(f"{title + m.kind:<22}{m.scheme:<14}{m.dtype:<16}{shape:<14}{m.count:>5}  {m.source}")
        if self.draft_reason is not None:
            lines.append(f"draft: {self.draft_reason}")
        return "\n".join(lines)


def describe(model: Glm4MoeForCausalLM | Glm4MoeForCausalLMNextN) -> tuple[ModuleReport, ...]:
    """Group a model's linears by kind and decision. Call before FP8 weights are expanded."""
    counts: Counter[tuple[str, str, str, tuple[int, ...] | None, str]] = Counter()

    def add(kind: str, scheme: LinearScheme, dtype: object, scales: ScaleStorage | None) -> None:
        shape = tuple(scales.weight_scale.shape) if scales is not None else None
        source = _generalised(scheme.source)
        counts[(kind, scheme.kind, str(dtype).removeprefix("torch."), shape, source)] += 1

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            kind = "shared_" + name.rsplit(".", 1)[-1] if "shared_experts" in name else name.rsplit(".", 1)[-1]
            add(kind, module.scheme, module.weight.dtype, module.scales)
        elif isinstance(module, Experts):
            for part, scheme, weight, scales in (
                ("experts.w13", module.w13_scheme, module.w13, module.w13_scales),
                ("experts.w2", module.w2_scheme, module.w2, module.w2_scales),
            ):
                add(part, scheme, weight.dtype, scales[0])
    return tuple(
        ModuleReport(kind, scheme, dtype, shape, count, source)
        for (kind, scheme, dtype, shape, source), count in counts.items()
    )


def _generalised(source: str) -> str:
    """Ignore entries differ by layer number only; show one line for all."""
    return ".".join("*" if part.isdigit() else part for part in source.split("."))
