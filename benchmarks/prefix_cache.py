"""Time to first token of requests that share a long prefix: the first computes it, the others find it."""

from __future__ import annotations

import statistics
import time

from nextn.llm import LLM
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling

from benchmarks.common import parser, prompts, report


def time_to_first_token(llm: LLM, rid: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds from adding the request to its first token, and how many prompt tokens were cached."""
    start = time.perf_counter()
    sampling = TokenSampling(max_new_tokens=1, seed=0, temperature=0.0, ignore_eos=True)
    llm.engine.add(AddRequest(rid=rid, input_ids=prompt, sampling=sampling))
    while True:
        outputs = llm.engine.step()
        if outputs:
            return time.perf_counter() - start, outputs[0].cached_tokens


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--num-requests", type=int, default=32)
    made.add_argument("--prefix-len", type=int, default=1500, help="shared tokens")
    args = made.parse_args()
    llm = LLM(args.model_path)
    questions = prompts(llm.tokenizer, 64)
    shared = [token for question in questions for token in question] * 100
    rows = []
    for repetition in range(2 if args.quick else 5):
        llm.engine.flush_cache()
        prefix = shared[repetition : repetition + args.prefix_len]
        times, cached = zip(
            *(
                time_to_first_token(llm, f"{repetition}-{i}", prefix + questions[i % 64])
                for i in range(args.num_requests)
            ),
            strict=True,
        )
        later = statistics.median(times[1:])
        rows.append(
            {
                "repetition": repetition,
                "first TTFT ms": times[0] * 1e3,
                "later TTFT ms (median)": later * 1e3,
                "later TTFT ms (worst)": max(times[1:]) * 1e3,
                "later / first": later / times[0],
                "cached tokens": min(cached[1:]),
            }
        )
    report(f"{args.num_requests} requests that share {args.prefix_len} tokens", rows, args.json)


if __name__ == "__main__":
    main()
