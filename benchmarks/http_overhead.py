"""What HTTP streaming costs: the server under concurrent streaming clients against the offline API, same prompts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from nextn.llm import LLM, SamplingParams

from benchmarks.common import alternate, parser, prompts, ratio, report, timed
from benchmarks.served import servers


async def stream_all(url: str, batch: list[list[int]], num_tokens: int) -> int:
    """Stream every prompt at once; returns the number of tokens received."""

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> int:
        body = {
            "input_ids": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        }
        last: dict[str, Any] = {}
        async with session.post(f"{url}/generate", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
        return int(last["meta_info"]["completion_tokens"])

    async with aiohttp.ClientSession() as session:
        return sum(await asyncio.gather(*(one(session, prompt) for prompt in batch)))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--num-streams", type=int, default=16)
    made.add_argument("--num-tokens", type=int, default=192, help="generated per stream")
    args = made.parse_args()
    llm = LLM(args.model_path, disable_radix_cache=True)
    batch = prompts(llm.tokenizer, args.num_streams)
    params = SamplingParams(temperature=0, max_new_tokens=args.num_tokens, ignore_eos=True)
    model = ["--model-path", args.model_path] if args.model_path else []

    def offline() -> float:
        seconds, outputs = timed(lambda: llm.generate(batch, params))
        return sum(len(out.output_ids) for out in outputs) / seconds

    with servers([("nextn.launch_server", "--disable-radix-cache", *model)]) as (url,):

        def http() -> float:
            seconds, tokens = timed(lambda: asyncio.run(stream_all(url, batch, args.num_tokens)))
            return tokens / seconds

        figures = alternate({"offline": offline, "http": http}, 3 if args.quick else 9)
    share = ratio(figures["http"], figures["offline"])
    middle = {name: sorted(values)[len(values) // 2] for name, values in figures.items()}
    row = {
        "streams": args.num_streams,
        "offline tok/s": middle["offline"],
        "HTTP tok/s": middle["http"],
        "HTTP / offline": share,
        "cost %": 100 * (1 - share),
    }
    report("HTTP streaming against the offline API", [row], args.json)


if __name__ == "__main__":
    main()
