"""Command-line options."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

BACKENDS = ("nextn", "sglang", "openai", "openai-chat", "vllm", "vllm-chat")
DATASETS = ("sharegpt", "random", "random-ids", "generated-shared-prefix")


@dataclass(frozen=True)
class BenchOptions:
    """The options of one run; the field names are the flags with underscores."""

    backend: str
    base_url: str | None
    host: str
    port: int
    api_key: str | None
    model: str | None
    tokenizer: str | None
    ready_check_timeout: float
    stall_timeout: float
    dataset_name: str
    dataset_path: str | None
    num_prompts: int
    random_input_len: int
    random_output_len: int
    random_range_ratio: float
    sharegpt_output_len: int | None
    gsp_num_groups: int
    gsp_prompts_per_group: int
    gsp_system_prompt_len: int
    gsp_question_len: int
    gsp_output_len: int
    apply_chat_template: bool
    seed: int
    request_rate: float
    max_concurrency: int | None
    warmup_requests: int
    flush_cache: bool
    disable_stream: bool
    disable_ignore_eos: bool
    extra_request_body: dict[str, Any]
    disable_tqdm: bool
    output_file: str | None
    output_details: bool
    plot: str | None
    compare: list[str] | None

    @property
    def url(self) -> str:
        """The server's root, without a trailing slash and without /v1."""
        url = (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")
        return url.removesuffix("/v1")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, found {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {type(value).__name__}")
    if not isinstance(value.get("sampling_params", {}), dict):
        raise argparse.ArgumentTypeError(f"sampling_params: expected a JSON object, found {value['sampling_params']!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The parser, grouped by what a flag is about."""
    parser = argparse.ArgumentParser(
        prog="python -m nextn.bench_serving",
        description="Measure an LLM server's throughput and latency.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    g = parser.add_argument_group("server")
    g.add_argument("--backend", choices=BACKENDS, default="nextn", help="protocol: native, completions or chat")
    g.add_argument("--base-url", help="server root, instead of --host and --port")
    g.add_argument("--host", default="127.0.0.1", help="server host")
    g.add_argument("--port", type=_positive, default=30000, help="server port")
    g.add_argument("--api-key", help="sent as a bearer token")
    g.add_argument("--model", help="model name; unset: the first of /v1/models")
    g.add_argument("--tokenizer", help="tokenizer folder or name; unset: the server's tokenizer_path, else the model")
    g.add_argument("--ready-check-timeout", type=float, default=60.0, help="seconds to wait for the server")
    g.add_argument("--stall-timeout", type=_positive_float, default=600.0, help="fail a request silent for seconds")
    g = parser.add_argument_group("dataset")
    g.add_argument("--dataset-name", choices=DATASETS, default="random", help="where prompts come from")
    g.add_argument("--dataset-path", help="ShareGPT file (JSON list or JSONL), or a hub id/filename")
    g.add_argument("--num-prompts", type=_positive, default=100, help="requests to send (not for shared-prefix)")
    g.add_argument("--random-input-len", type=_positive, default=1024, help="prompt tokens")
    g.add_argument("--random-output-len", type=_positive, default=128, help="output tokens")
    g.add_argument("--random-range-ratio", type=_ratio, default=1.0, help="lengths are uniform in [ratio*len, len]")
    g.add_argument("--sharegpt-output-len", type=_positive, help="output tokens; unset: the recorded answer's length")
    g.add_argument("--gsp-num-groups", type=_positive, default=8, help="shared system prompts")
    g.add_argument("--gsp-prompts-per-group", type=_positive, default=8, help="questions per system prompt")
    g.add_argument("--gsp-system-prompt-len", type=_positive, default=1024, help="tokens of a system prompt")
    g.add_argument("--gsp-question-len", type=_positive, default=128, help="tokens of a question")
    g.add_argument("--gsp-output-len", type=_positive, default=128, help="output tokens")
    g.add_argument("--apply-chat-template", action="store_true", help="render prompts with the chat template")
    g.add_argument("--seed", type=_count, default=1, help="seed of the dataset and of the arrivals")
    g = parser.add_argument_group("load")
    g.add_argument("--request-rate", type=_positive_float, default=float("inf"), help="Poisson arrivals per second")
    g.add_argument("--max-concurrency", type=_positive, help="most requests in flight")
    g.add_argument("--warmup-requests", type=_count, default=1, help="sent first, not measured")
    g.add_argument("--flush-cache", action="store_true", help="empty the server's prefix cache after the warm-up")
    g.add_argument("--disable-stream", action="store_true", help="one answer per request; no TTFT, TPOT, ITL")
    g.add_argument("--disable-ignore-eos", action="store_true", help="let the model stop by itself")
    g.add_argument("--extra-request-body", type=_json_object, default={}, help="JSON object merged into each request")
    g = parser.add_argument_group("output")
    g.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    g.add_argument("--output-file", help="append one JSON line per run")
    g.add_argument("--output-details", action="store_true", help="with per-request arrays in that line")
    g.add_argument("--plot", metavar="FILE.png", help="draw the run")
    g.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="compare two files' last lines and exit")
    return parser


def parse_options(argv: Sequence[str] | None = None) -> BenchOptions:
    """Parse argv (default: sys.argv)."""
    namespace = make_parser().parse_args(argv)
    return BenchOptions(**{f.name: getattr(namespace, f.name) for f in fields(BenchOptions)})
