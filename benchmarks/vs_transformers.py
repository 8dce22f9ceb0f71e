"""nextn against transformers' generate: same weights, greedy, one stream and sixteen at once.

transformers runs with its KV cache and left-padded batching, on the weights that nextn expands from FP8, in float32,
and each side with the number of threads that it takes by default.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from nextn import demo
from nextn.checkpoint.index import CheckpointIndex
from nextn.kernels.fp8_dequantize import dequantize
from nextn.llm import LLM, SamplingParams
from safetensors.torch import save_file
from transformers import Glm4MoeForCausalLM

from benchmarks.common import alternate, parser, prompts, ratio, report, timed


def load_transformers(folder: Path) -> Glm4MoeForCausalLM:
    """The checkpoint's target with per-channel FP8 weights dequantized, as transformers loads a float32 one."""
    config = json.loads((folder / "config.json").read_text())
    draft_prefix = f"model.layers.{config['num_hidden_layers']}."
    index = CheckpointIndex.open(folder)
    state = {}
    with index.reader() as read:
        for name in index.tensors:
            if name.startswith(draft_prefix) or name.endswith("_scale"):
                continue
            tensor = read(name)
            scale = name.removesuffix("weight") + "weight_scale"
            state[name] = dequantize(tensor, read(scale).float()) if scale in index.tensors else tensor.float()
    config = {k: v for k, v in config.items() if k != "quantization_config"} | {"num_nextn_predict_layers": 0}
    with tempfile.TemporaryDirectory() as twin:
        (Path(twin) / "config.json").write_text(json.dumps(config))
        save_file(state, Path(twin) / "model.safetensors")
        return Glm4MoeForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()


@torch.inference_mode()
def transformers_generate(model: Glm4MoeForCausalLM, batch: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Exactly num_tokens greedy tokens for each prompt, left-padded to one length."""
    longest = max(map(len, batch))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    return [row[longest:].tolist() for row in out]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--num-tokens", type=int, default=96, help="generated per stream")
    args = made.parse_args()
    folder = Path(args.model_path) if args.model_path else demo.checkpoint_dir()
    their_threads = torch.get_num_threads()
    llm = LLM(str(folder), disable_radix_cache=True)
    our_threads = torch.get_num_threads()
    model = load_transformers(folder)
    params = SamplingParams(temperature=0, max_new_tokens=args.num_tokens, ignore_eos=True)
    rows = []
    for num_streams in (1, 16):
        batch = prompts(llm.tokenizer, num_streams)
        outputs: dict[str, list[list[int]]] = {}

        def run_ours(batch: list[list[int]] = batch, outputs: dict[str, list[list[int]]] = outputs) -> float:
            torch.set_num_threads(our_threads)
            seconds, found = timed(lambda: llm.generate(batch, params))
            outputs["nextn"] = [out.output_ids for out in found]
            return args.num_tokens * len(batch) / seconds

        def run_theirs(batch: list[list[int]] = batch, outputs: dict[str, list[list[int]]] = outputs) -> float:
            torch.set_num_threads(their_threads)
            seconds, outputs["transformers"] = timed(lambda: transformers_generate(model, batch, args.num_tokens))
            return args.num_tokens * len(batch) / seconds

        figures = alternate({"nextn": run_ours, "transformers": run_theirs}, 2 if args.quick else 5)
        same = sum(a == b for a, b in zip(outputs["nextn"], outputs["transformers"], strict=True))
        rows.append(
            {
                "streams": num_streams,
                "nextn tok/s": sorted(figures["nextn"])[len(figures["nextn"]) // 2],
                "transformers tok/s": sorted(figures["transformers"])[len(figures["transformers"]) // 2],
                "ratio": ratio(figures["nextn"], figures["transformers"]),
                "equal outputs": f"{same} of {num_streams}",
            }
        )
    report(f"nextn with {our_threads} and transformers with {their_threads} threads, greedy", rows, args.json)


if __name__ == "__main__":
    main()
