"""A picture of the memory: per tensor-parallel size, what the parts of the model take of a card and what KV gets."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nextn.diagnosis.checkup import GB, Diagnosis
from nextn.diagnosis.memory import PARTS, RESERVED_SHARE
from nextn.errors import ConfigError

_COLORS = ("#2e86ab", "#d1495b", "#f18f01", "#66a182", "#8d5a97", "#1b1b3a")


def plot_memory(diagnosis: Diagnosis, path: Path) -> None:
    """Write the picture as a PNG.

    Raises ConfigError if the file cannot be written.
    """
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    ticks = range(len(diagnosis.memory))
    bottom = [0.0] * len(diagnosis.memory)
    for part, color in zip(PARTS, _COLORS, strict=True):
        heights = [one.parts[part] / GB for one in diagnosis.memory]
        axis.bar(ticks, heights, bottom=bottom, color=color, label=part, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    usable = diagnosis.gpu_gb * (1 - RESERVED_SHARE)
    room = [max(usable - low, 0) if one.fits else 0 for low, one in zip(bottom, diagnosis.memory, strict=True)]
    axis.bar(ticks, room, bottom=bottom, color="#d9d9d9", hatch="//", edgecolor="white", label="KV", width=0.6)
    axis.axhline(diagnosis.gpu_gb, color="gray", linestyle="--", linewidth=1, label=f"card, {diagnosis.gpu_gb:g} GB")
    for tick, one, low, kv in zip(ticks, diagnosis.memory, bottom, room, strict=True):
        text = f"{one.kv_tokens:,} tokens" if one.fits else "cannot be cut" if one.why_not else "does not fit"
        axis.annotate(text, (tick, low + kv), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(list(ticks), [f"{one.tp_size} GPU{'s' * (one.tp_size > 1)}" for one in diagnosis.memory])
    axis.set(ylabel="GB per GPU", title=f"{Path(diagnosis.checkpoint).name}: memory by part")
    axis.margins(y=0.06)
    axis.legend(fontsize=8, loc="upper right")
    axis.grid(axis="y", alpha=0.25)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error}); give a file in a folder that exists") from None
