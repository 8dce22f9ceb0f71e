"""What loading decided, per kind of module: for the log, for /get_server_info, for the doctor, for a bug report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nextn.checkpoint.layout import Layout
from nextn.checkpoint.source import Source

DTYPE_NAMES = {
    "F8_E4M3": "float8_e4m3fn",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
HEADER = ("module", "scheme", "dtype", "scales", "count", "decided by")


@dataclass(frozen=True)
class ModuleReport:
    """Modules of one kind that were decided alike.

    kind: "qkv_proj", "experts.w13", "norms", "router gate", …
    dtype: of the weights as stored; scale_shape: of one (fused) module's scales, None without
    count: of (fused) modules; each expert counts
    source: where the decision came from
    """

    kind: str
    scheme: str
    dtype: str
    scale_shape: tuple[int, ...] | None
    count: int
    source: str

    def cells(self) -> tuple[str, ...]:
        """One row of a table under HEADER."""
        shape = "-" if self.scale_shape is None else "x".join(map(str, self.scale_shape))
        return self.kind, self.scheme, self.dtype, shape, str(self.count), self.source


@dataclass(frozen=True)
class LoadReport:
    """draft_reason: how the draft's quantization was decided; None without a draft.

    draft_path: the other checkpoint that the NextN layer comes from; None if it is the target's own
    """

    target: tuple[ModuleReport, ...]
    draft: tuple[ModuleReport, ...]
    draft_reason: str | None
    draft_path: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_table(self) -> str:
        """A short table for the log."""
        titled = (("", self.target), ("draft ", self.draft))
        rows = [HEADER, *((title + m.kind, *m.cells()[1:]) for title, modules in titled for m in modules)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        ]
        if self.draft_reason is not None:
            lines.append(f"draft: {self.draft_reason}" + (f"; from {self.draft_path}" if self.draft_path else ""))
        return "\n".join(lines)


def report_target(source: Source, layout: Layout) -> tuple[ModuleReport, ...]:
    """Group the target's modules by kind and decision."""
    return _grouped(_modules(source, layout))


def report_draft(source: Source, layout: Layout, target: Source, *, has_fp8_head: bool) -> tuple[ModuleReport, ...]:
    """The NextN layer's modules, and the embedding and head that it borrows from the target."""
    own = {tensor.kind for tensor in layout.others}
    head = "model.embed_tokens.weight" if target.config.tie_word_embeddings else "lm_head.weight"
    borrowed = [
        ModuleReport(kind, "unquantized", _dtype(target, name), None, 1, "the target's: the layer has none of its own")
        for kind, name in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", head))
        if kind not in own
    ]
    modules = (*_grouped(_modules(source, layout)), *borrowed)
    if not has_fp8_head:
        return modules
    return tuple(
        replace(one, source=f"{one.source}; drafts read it as FP8") if one.kind == "lm_head" else one for one in modules
    )


def _modules(source: Source, layout: Layout) -> Iterator[ModuleReport]:
    for linear in layout.linears:
        scheme, name = linear.scheme, f"{linear.shards[0][0]}.weight"
        dtype = "float8_e4m3fn" if scheme.is_quantized else _dtype(source, name)
        reason = _generalised(scheme.source)
        yield ModuleReport(linear.kind, scheme.kind, dtype, linear.scale_shape, linear.num_matrices, reason)
    for tensor in layout.others:
        yield ModuleReport(tensor.kind, "unquantized", _dtype(source, tensor.name), None, 1, "never quantized")


def _dtype(source: Source, tensor_name: str) -> str:
    """As stored; without files, the type that config.json names."""
    info = source.index.tensors.get(tensor_name) if source.index is not None else None
    return DTYPE_NAMES.get(info.dtype, info.dtype) if info is not None else source.config.dtype


def _grouped(modules: Iterable[ModuleReport]) -> tuple[ModuleReport, ...]:
    """Modules that differ in their count only, as one."""
    counts: Counter[ModuleReport] = Counter()
    for module in modules:
        counts[replace(module, count=0)] += module.count
    return tuple(replace(module, count=count) for module, count in counts.items())


def _generalised(source: str) -> str:
    """Ignore entries differ by layer and expert number only; show one line for all."""
    return ".".join("*" if part.isdigit() else part for part in source.split("."))
