"""What a lost quantization config costs: the same FP8 checkpoint behind real servers, over HTTP, its draft five ways.

    kept               the draft's config is what the loader detected; 3 drafts per step
    dropped            the draft's constructor loses it: FP8 codes are read as numbers, scales are left out; 3 drafts
    unquant            --speculative-draft-model-quantization unquant; 3 drafts
    dropped, adaptive  dropped, but with the server's default: as many drafts as measurably pay
    off                --speculative-algorithm none

Every way gives the same answers; on a GPU up to ties. In each round each way runs once; a ratio is the median over the
rounds.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextn.checkpoint.hub import resolved_config
from nextn.config.server_args import ServerArgs
from nextn.text.tokenizer import Tokenizer

from benchmarks.common import alternate, parser, prompts, ratio, report, timed
from benchmarks.served import engine_info, generate_all, servers

NUM_STREAMS = (1, 8, 16)
NUM_TOKENS = 192
THREE = ("--speculative-num-steps", "3")
WAYS: dict[str, tuple[str, ...]] = {
    "kept": ("nextn.launch_server", *THREE),
    "dropped": ("benchmarks.mutant_server", "raw-fp8", *THREE),
    "unquant": ("nextn.launch_server", *THREE, "--speculative-draft-model-quantization", "unquant"),
    "dropped, adaptive": ("benchmarks.mutant_server", "raw-fp8"),
    "off": ("nextn.launch_server", "--speculative-algorithm", "none"),
}
COLORS = ("#2e86ab", "#d1495b", "#66a182", "#e8a0a8", "#9a9a9a")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table here")
    made.add_argument("--num-prompts", type=int, help="answered in each round; default: 96, with --quick 24")
    made.add_argument("--rounds", type=int, help="default: 9, with --quick 3")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the servers', default: %(default)s")
    made.add_argument("--streams", type=int, nargs="+", default=NUM_STREAMS, help="at once")
    made.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], help="beside kept, dropped and off")
    args = made.parse_args()
    folder = resolved_config(ServerArgs(model_path=args.model_path)).model_path
    batch = prompts(Tokenizer(folder), args.num_prompts or (24 if args.quick else 96))
    flags = ["--model-path", folder, "--disable-radix-cache", "--max-total-tokens", "32768", "--device", args.device]
    flags += ["--max-running-requests", str(max(args.streams))]
    ways = [way for way in WAYS if way in {*args.ways, "kept", "dropped", "off"}]
    with servers([(*WAYS[way], *flags) for way in ways]) as urls:
        rounds = args.rounds or (3 if args.quick else 9)
        rows = measure(dict(zip(ways, urls, strict=True)), batch, rounds, args.streams, may_differ=args.device != "cpu")
    report("An FP8 checkpoint's draft, over HTTP, greedy", rows, args.json)
    if args.plot is not None:
        plot(rows, args.plot)


def measure(
    urls: dict[str, str], batch: list[list[int]], rounds: int, streams: Sequence[int], *, may_differ: bool
) -> list[dict[str, Any]]:
    """One row per number of streams and way. may_differ: whether an answer may, where two tokens are as likely."""
    rows = []
    for num_streams in streams:
        answers: dict[str, list[list[int]]] = {}

        def throughput(
            way: str, num_streams: int = num_streams, answers: dict[str, list[list[int]]] = answers
        ) -> float:
            seconds, answers[way] = timed(lambda: asyncio.run(generate_all(urls[way], batch, num_streams, NUM_TOKENS)))
            return sum(map(len, answers[way])) / seconds

        before = {way: _counts(url) for way, url in urls.items()}
        figures = alternate({way: lambda way=way: throughput(way) for way in urls}, rounds)  # type: ignore[misc]
        if not may_differ and any(found != answers["off"] for found in answers.values()):
            raise SystemExit("a draft changed the answers, which it must never do")
        for way, url in urls.items():
            passes, accepted = (now - then for now, then in zip(_counts(url), before[way], strict=True))
            rows.append(
                {
                    "streams": num_streams,
                    "draft": way,
                    "tok/s": statistics.median(figures[way]),
                    "against off": ratio(figures[way], figures["off"]),
                    "against dropped": ratio(figures[way], figures["dropped"]),
                    "against kept": ratio(figures[way], figures["kept"]),
                    "accept length": 1 + accepted / passes if passes else 1.0,
                    "same answers": _share_alike(answers[way], answers["off"]),
                }
            )
    return rows


def _share_alike(answers: list[list[int]], others: list[list[int]]) -> float:
    return sum(a == b for a, b in zip(answers, others, strict=True)) / len(answers)


def _counts(url: str) -> tuple[int, int]:
    """Verify passes that had drafts, and accepted drafts."""
    stats = engine_info(url)["stats"]
    return stats["num_verify_passes"], sum(stats["accepted_per_position"])


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of throughput against no speculation, with the accept lengths in them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.9 / len(WAYS)
    for i, (way, color) in enumerate(zip(WAYS, COLORS, strict=True)):
        for group, row in enumerate(row for row in rows if row["draft"] == way):
            at, height = group + i * width, row["against off"]
            axis.bar(at, height, 0.92 * width, color=color, label=None if group else way)
            axis.text(at, height + 0.02, f"{height:.2f}×", ha="center", va="bottom", fontsize=8)
            if way != "off":
                text = f"{row['accept length']:.2f}"
                axis.text(at, height - 0.02, text, ha="center", va="top", fontsize=8, color="white")
    axis.axhline(1, color=COLORS[-1], linewidth=0.8, zorder=0)
    streams = list(dict.fromkeys(row["streams"] for row in rows))
    middles = [group + width * (len(WAYS) - 1) / 2 for group in range(len(streams))]
    axis.set_xticks(middles, [f"{num} stream{'s' if num > 1 else ''}" for num in streams])
    axis.set(ylabel="throughput against no speculation", ylim=(0, 1.2 * max(row["against off"] for row in rows)))
    axis.set_title("One FP8 checkpoint, five ways to draft with it (in the bars: accept length)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=len(WAYS), loc="upper center", frameon=False)
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    main()
