"""A diagnosis for a person: a verdict first, then tables, in colour where the terminal has it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nextn.checkpoint.report import HEADER, ModuleReport
from nextn.diagnosis.checkup import GB, Diagnosis
from nextn.diagnosis.memory import PARTS, RESERVED_SHARE
from nextn.diagnosis.pitfalls import Pitfall

PLAIN_WIDTH = 120
"""Columns where the output is no terminal."""


def make_console() -> Console:
    """Standard output; NO_COLOR and the like are rich's to honour."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=PLAIN_WIDTH)


def show(diagnosis: Diagnosis, console: Console) -> None:
    _verdict(diagnosis, console)
    if diagnosis.report is not None:
        console.print("", _modules("Target", diagnosis.report.target), sep="\n")
        if diagnosis.report.draft:
            console.print("", _modules("NextN layer", diagnosis.report.draft), sep="\n")
    if diagnosis.memory:
        console.print("", _memory(diagnosis), sep="\n")
        _notes(diagnosis, console)
    if diagnosis.pitfalls:
        console.print("\n[bold]What other servers get wrong with this layout, without an error[/bold]")
        for pitfall in diagnosis.pitfalls:
            _pitfall(pitfall, console)
    if diagnosis.command is not None:
        console.print("\n[bold]To serve it[/bold]")
        console.print(Text(f"  {diagnosis.command}", style="cyan"), soft_wrap=True)
        if not diagnosis.memory:
            return
        needs = "no size in the table" if diagnosis.min_gpus is None else f"at least {diagnosis.min_gpus}"
        console.print(f"  [dim]GPUs of {diagnosis.gpu_gb:g} GB: {needs}[/dim]", highlight=False)


def _verdict(diagnosis: Diagnosis, console: Console) -> None:
    console.print(f"\n[bold]{escape(diagnosis.checkpoint)}[/bold]  [dim]read: {diagnosis.depth}[/dim]")
    model = diagnosis.model
    if model is not None:
        draft = f" + {_count(model.draft_parameters)} in the NextN layer" if model.draft_parameters else ""
        console.print(
            f"{_count(model.parameters)} parameters{draft}, {model.num_layers} layers, {model.num_experts} experts, "
            f"{model.quantization}, {model.stored_bytes / GB:.2f} GB"
        )
    if diagnosis.refusal is not None:
        console.print("[bold red]✗ refused[/bold red]  the server would stop with this error:")
        console.print(Text(f"  {diagnosis.refusal}"))
        _without_draft(diagnosis, console)
        return
    if diagnosis.gpu_refusal is None:
        console.print("[bold green]✓ serves[/bold green]")
    else:
        console.print("[bold red]✗ refused on GPUs[/bold red]  the server would stop with this error:")
        console.print(Text(f"  {diagnosis.gpu_refusal}"))
        _without_draft(diagnosis, console)
        console.print("[bold green]✓ serves[/bold green] on a CPU")
    if diagnosis.drafts:
        mark = "[bold yellow]! drafts[/bold yellow]" if diagnosis.concerns else "[bold green]✓ drafts[/bold green]"
        console.print(f"{mark}  {diagnosis.precision} ({escape(diagnosis.reason or '')})")
    else:
        console.print("[bold yellow]✗ does not draft[/bold yellow]")
    for text in (*diagnosis.concerns, *diagnosis.warnings):
        console.print(Text(f"  {text}", style="yellow"))


def _without_draft(diagnosis: Diagnosis, console: Console) -> None:
    if diagnosis.serves_without_draft:
        console.print("  [yellow]It serves without drafts: --speculative-algorithm none[/yellow]")


def _modules(title: str, modules: tuple[ModuleReport, ...]) -> Table:
    table = _table(title)
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if name == "count" else "left", overflow="fold", no_wrap=i < 2)
    for module in modules:
        style = "" if module.scheme == "unquantized" else "green"
        table.add_row(*map(escape, module.cells()), style=style)
    return table


def _memory(diagnosis: Diagnosis) -> Table:
    size, unit = (GB, "GB") if max(one.weight_bytes for one in diagnosis.memory) >= GB else (10**6, "MB")
    reserved = f"{RESERVED_SHARE:.0%} of the card kept free"
    card = f"Memory in {unit} per GPU of {diagnosis.gpu_gb:g} GB"
    table = _table(f"{card}: weights as stored, KV in bfloat16, {reserved}")
    table.add_column("GPUs", justify="right")
    for part in PARTS:
        table.add_column(part, justify="right")
    for name in ("weights", "KV per token", "KV tokens"):
        table.add_column(name, justify="right")
    for one in diagnosis.memory:
        parts = [f"{one.parts[part] / size:.2f}" for part in PARTS]
        kv = f"{one.kv_bytes_per_token / 1024:.0f} KiB"
        left = f"{one.kv_tokens:,}" if one.fits else "cannot be cut" if one.why_not else "does not fit"
        style = "green" if one.fits else "dim"
        table.add_row(str(one.tp_size), *parts, f"{one.weight_bytes / size:.2f}", kv, left, style=style)
    return table


def _notes(diagnosis: Diagnosis, console: Console) -> None:
    assert diagnosis.model is not None, "what has a memory table has been read"
    most = diagnosis.model.context_length
    for one in diagnosis.memory:
        gpus = f"{one.tp_size} GPU{'s' * (one.tp_size > 1)}"
        if one.why_not is not None:
            console.print(Text(f"  {gpus}: {one.why_not}", style="dim"))
        if one.uneven:
            console.print(Text(f"  {gpus} with uneven shares: {'; '.join(one.uneven)}", style="yellow"))
        if one.fits and one.context_length < most:
            text = f"  {gpus}: room for requests of {one.context_length:,} tokens, of the model's {most:,}"
            console.print(Text(text, style="yellow"))


def _pitfall(pitfall: Pitfall, console: Console) -> None:
    console.print(f"• [bold]{escape(pitfall.name)}[/bold]: {escape(pitfall.because)}", highlight=False)
    console.print(Padding(Text(f"elsewhere: {pitfall.elsewhere}", style="dim"), (0, 0, 0, 2)))
    console.print(Padding(Text(f"here: {pitfall.here}"), (0, 0, 0, 2)))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"
