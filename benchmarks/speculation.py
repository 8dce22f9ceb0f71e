"""NextN drafts on against off, through the offline API: throughput and accept length by number of drafts.

"policy" is the default, which picks the number step by step; it should come close to the best fixed number. "policy,
garbage" is the same with a draft layer of shuffled weights, whose drafts are all wrong: it should come close to none.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from nextn import demo
from nextn.llm import LLM, SamplingParams
from safetensors.torch import load_file, save_file

from benchmarks.common import alternate, parser, prompts, ratio, report, timed

NUM_PROMPTS = 64


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
    with tempfile.TemporaryDirectory() as scratch:
        garbage = shuffle_draft(folder, Path(scratch) / "garbage")
        sides: dict[str, tuple[Path, int | None]] = {str(k): (folder, k) for k in ((0, 3) if args.quick else range(6))}
        sides |= {"policy": (folder, None), "policy, garbage": (garbage, None)}
        engines = {
            name: LLM(str(path), speculative_num_steps=k, disable_radix_cache=True, max_total_tokens=32768)
            for name, (path, k) in sides.items()
        }
    drawn = prompts(engines["0"], NUM_PROMPTS)
    rows = []
    for num_streams in args.streams:
        used = drawn[: 16 if num_streams < 16 or args.quick else NUM_PROMPTS]
        batches = [used[i : i + num_streams] for i in range(0, len(used), num_streams)]

        def throughput(llm: LLM, batches: list[list[list[int]]] = batches) -> float:
            seconds, outputs = timed(lambda: [out for batch in batches for out in llm.generate(batch, params)])
            return sum(len(out.output_ids) for out in outputs) / seconds

        figures = alternate(
            {name: lambda llm=llm: throughput(llm) for name, llm in engines.items()},  # type: ignore[misc]
            2 if args.quick else 5,
        )
        rows += [
            {
                "streams": num_streams,
                "drafts": name,
                "tok/s": sorted(figures[name])[len(figures[name]) // 2],
                "against none": ratio(figures[name], figures["0"]),
                "accept length": llm.stats.accept_length or 1.0,
            }
            for name, llm in engines.items()
        ]
    report("NextN drafts on against off, greedy", rows, args.json)


if __name__ == "__main__":
    main()
