"""NextN drafts on against off, through the offline API: throughput and accept length by number of drafts.

"policy" is the default, which picks the number step by step.
"""

from __future__ import annotations

from nextn.llm import LLM, SamplingParams

from benchmarks.common import alternate, parser, prompts, ratio, report, timed


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--num-tokens", type=int, default=128, help="generated per stream")
    args = made.parse_args()
    params = SamplingParams(temperature=0, max_new_tokens=args.num_tokens)
    steps: tuple[int | None, ...] = (0, 3, None) if args.quick else (0, 1, 2, 3, 4, 5, None)
    engines = {
        k: LLM(args.model_path, speculative_num_steps=k, disable_radix_cache=True, max_total_tokens=32768)
        for k in steps
    }
    rows = []
    for num_streams in (1, 4, 16):
        batches = [prompts(engines[0], 16)[i : i + num_streams] for i in range(0, 16, num_streams)]
        batches = batches[:4] if args.quick else batches

        def throughput(llm: LLM, batches: list[list[list[int]]] = batches) -> float:
            seconds, outputs = timed(lambda: [out for batch in batches for out in llm.generate(batch, params)])
            return sum(len(out.output_ids) for out in outputs) / seconds

        figures = alternate(
            {str(k): lambda llm=llm: throughput(llm) for k, llm in engines.items()},  # type: ignore[misc]
            3 if args.quick else 5,
        )
        for k, llm in engines.items():
            rows.append(
                {
                    "streams": num_streams,
                    "drafts": "policy" if k is None else k,
                    "tok/s": sorted(figures[str(k)])[len(figures[str(k)]) // 2],
                    "against none": ratio(figures[str(k)], figures["0"]),
                    "accept length": 1.0 if k == 0 else llm.stats.accept_length,
                }
            )
    report("NextN drafts on against off, greedy", rows, args.json)


if __name__ == "__main__":
    main()
