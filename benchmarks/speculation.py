"""NextN drafts on against off, through the offline API: throughput and accept length by number of drafts.

"policy" is the default, which picks the number step by step; it should come close to the best fixed number. "policy,
garbage" is the same with a draft layer of shuffled weights, whose drafts are all wrong: it should come close to none.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from nextn import demo
from nextn.config.engine_config import MAX_NUM_DRAFT_STEPS
from nextn.llm import LLM, SamplingParams
from safetensors.torch import load_file, save_file

from benchmarks.common import alternate, parser, prompts, ratio, report, timed


def shuffle_draft(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint that keeps its NextN layer apart, with every matrix of that layer shuffled."""
    copy = Path(shutil.copytree(folder, to, dirs_exist_ok=True))
    state = load_file(copy / "mtp.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.dim() == 2 and not name.endswith("_scale"):
            order = torch.randperm(tensor.numel(), generator=generator)
            state[name] = tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int16).flatten()[order]
            state[name] = state[name].view(tensor.dtype).view(tensor.shape)
    save_file(state, copy / "mtp.safetensors")
    return copy


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--num-tokens", type=int, default=128, help="generated per stream, at most")
    made.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], help="at once")
    args = made.parse_args()
    params = SamplingParams(temperature=0, max_new_tokens=args.num_tokens)
    folder = Path(args.model_path) if args.model_path else demo.checkpoint_dir()
    ks = (0, 3) if args.quick else range(MAX_NUM_DRAFT_STEPS + 1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        garbage = shuffle_draft(folder, Path(scratch) / "garbage")
        sides: dict[str, tuple[Path, int | None]] = {str(k): (folder, k) for k in ks}
        sides |= {"policy": (folder, None), "policy, garbage": (garbage, None)}
        for num_streams in args.streams:
            rows += measure(sides, num_streams, params, args.quick)
    report("NextN drafts on against off, greedy", rows, args.json)


def measure(
    sides: dict[str, tuple[Path, int | None]], num_streams: int, params: SamplingParams, is_quick: bool
) -> list[dict[str, Any]]:
    """Rows of the table for ``num_streams`` requests at once: as one finishes, the next starts."""
    engines = {
        name: LLM(
            str(path),
            speculative_num_steps=k,
            disable_radix_cache=True,
            max_running_requests=num_streams,
            max_total_tokens=512 * num_streams,
            speculative_canary="off",
        )
        for name, (path, k) in sides.items()
    }
    used = prompts(engines["0"].tokenizer, max(16, (1 if is_quick else 4) * num_streams))

    def throughput(llm: LLM) -> float:
        seconds, outputs = timed(lambda: llm.generate(used, params))
        return sum(len(out.output_ids) for out in outputs) / seconds

    runs = {name: lambda llm=llm: throughput(llm) for name, llm in engines.items()}  # type: ignore[misc]
    figures = alternate(runs, 2 if is_quick else 9)
    best = max((name for name, (_, k) in sides.items() if k is not None), key=lambda k: statistics.median(figures[k]))
    return [
        {
            "streams": num_streams,
            "drafts": name,
            "tok/s": statistics.median(figures[name]),
            "against none": ratio(figures[name], figures["0"]),
            "against best number": ratio(figures[name], figures[best]),
            "accept length": llm.stats.accept_length or 1.0,
        }
        for name, llm in engines.items()
    ]


if __name__ == "__main__":
    main()
