"""Everything a user can set: one typed definition for flags, environment variables and a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nextn.config.engine_config import MAX_NUM_DRAFT_STEPS, EngineConfig
from nextn.config.sources import Option, flag_of, read_sources
from nextn.errors import ConfigError

NEXTN_ALGORITHMS = ("NEXTN", "EAGLE")
DEFAULT_DRAFT_STEPS = 3
UNSET = "unset"


def _option(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    kind: type | None = None,
    is_secret: bool = False,
) -> Any:
    """A field that is also a flag. kind: the value's type, where the default is None."""
    option = Option(group, help, tuple(choices) if choices else None, least, most, kind or type(default))
    return field(default=default, repr=not is_secret, metadata={"option": option})


_MODEL, _SCHEDULE, _SPECULATION = "model", "scheduling and memory", "speculative decoding"
_PARALLEL = "several GPUs and nodes"
_HTTP, _LIMITS, _RUNTIME = "HTTP and API", "request limits", "runtime"


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """The server's arguments.

    Constructing one checks every value and how they fit together, and raises ConfigError. Choices are taken in any
    case and kept in the case that --help shows.
    """

    model_path: str | None = _option(
        None, _MODEL, "folder or hub name of a GLM-4.x MoE checkpoint; default: the embedded model", kind=str
    )
    tokenizer_path: str | None = _option(None, _MODEL, "folder with tokenizer.json; default: the model's", kind=str)
    skip_tokenizer_init: bool = _option(False, _MODEL, "serve token ids in and out only")
    chat_template: str | None = _option(None, _MODEL, "Jinja file to use instead of the model's template", kind=str)
    served_model_name: str | None = _option(
        None, _MODEL, "name in the API; default: the hub name, or the folder's", kind=str
    )
    context_length: int | None = _option(
        None, _MODEL, "most tokens of one request; default: the model's", kind=int, least=2
    )
    load_format: str = _option("auto", _MODEL, "dummy: random weights", choices=("auto", "dummy"))
    dtype: str = _option(
        "auto",
        _MODEL,
        "computing type of what is not quantized; auto is float32 on a CPU, bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str | None = _option(
        None,
        _MODEL,
        "require this method, of FP8 weights also where config.json declares none; default: as detected",
        choices=("compressed-tensors", "fp8"),
        kind=str,
    )

    device: str = _option("auto", _MODEL, "auto: the GPU where there is one", choices=("auto", "cpu", "cuda"))
    kv_cache_dtype: str = _option(
        "auto", _MODEL, "type of stored keys and values; auto: the computing type", choices=("auto", "fp8_e4m3")
    )
    enable_deterministic_inference: bool = _option(
        False, _MODEL, "on a GPU, the same tokens whatever else is in the batch; slower"
    )

    max_running_requests: int = _option(64, _SCHEDULE, "requests computed at once", least=1, most=4096)
    max_queued_requests: int = _option(1024, _SCHEDULE, "requests that may wait; more get 429", least=1)
    max_total_tokens: int | None = _option(
        None, _SCHEDULE, "KV pool size in tokens; default: from free memory", kind=int, least=2
    )
    chunked_prefill_size: int | None = _option(
        None,
        _SCHEDULE,
        "most prompt tokens per step; -1: whole prompts; default: 512 on a CPU, 4096 on a GPU",
        kind=int,
        least=-1,
    )
    schedule_policy: str = _option("fcfs", _SCHEDULE, "order of waiting requests", choices=("fcfs", "priority"))
    page_size: int = _option(16, _SCHEDULE, "tokens per KV page", least=1, most=1024)
    disable_radix_cache: bool = _option(False, _SCHEDULE, "do not reuse the KV of shared prefixes")
    mem_fraction_static: float = _option(
        0.9, _SCHEDULE, "share of a GPU's memory to use, the KV pool included", least=0.1, most=0.99
    )
    cuda_graph_max_bs: int | None = _option(
        None, _SCHEDULE, "most sequences of a recorded step; default: all that run", kind=int, least=1, most=4096
    )
    disable_cuda_graph: bool = _option(False, _SCHEDULE, "launch every kernel of a step from the CPU")
    disable_overlap_schedule: bool = _option(
        False, _SCHEDULE, "read a step's tokens from the GPU before the next is launched"
    )

    tp_size: int = _option(1, _PARALLEL, "ranks (GPUs) that hold one model together", least=1, most=1024)
    nnodes: int = _option(1, _PARALLEL, "nodes over which the ranks are spread evenly", least=1, most=1024)
    node_rank: int = _option(0, _PARALLEL, "number of this node, from 0; node 0 serves HTTP", least=0)
    dist_init_addr: str | None = _option(
        None, _PARALLEL, "HOST:PORT of node 0, where the ranks of all nodes meet", kind=str
    )

    speculative_algorithm: str | None = _option(
        None,
        _SPECULATION,
        "NEXTN drafts with the model's own layer; default: wherever the checkpoint has it",
        choices=(*NEXTN_ALGORITHMS, "none"),
        kind=str,
    )
    speculative_num_steps: int | None = _option(
        None,
        _SPECULATION,
        "drafts per step; default: as many as measurably pay, 3 with --speculative-algorithm NEXTN",
        kind=int,
        least=0,
        most=MAX_NUM_DRAFT_STEPS,
    )
    speculative_eagle_topk: int | None = _option(
        None, _SPECULATION, "branches per draft step; only 1, a chain", kind=int
    )
    speculative_num_draft_tokens: int | None = _option(
        None,
        _SPECULATION,
        "tokens verified per step; always the steps + 1",
        kind=int,
        least=1,
        most=MAX_NUM_DRAFT_STEPS + 1,
    )
    speculative_draft_model_path: str | None = _option(
        None, _SPECULATION, "take the NextN layer from another checkpoint", kind=str
    )
    speculative_draft_model_quantization: str | None = _option(
        None,
        _SPECULATION,
        "unset keeps what is detected; unquant dequantizes on load",
        choices=(UNSET, "unquant", "compressed-tensors", "fp8"),
        kind=str,
    )
    speculative_draft_head: str = _option(
        "auto",
        _SPECULATION,
        "what drafts read of the output head; fp8: quantized on load, half the bytes; auto: fp8 where the layer is",
        choices=("auto", "fp8", "stored"),
    )
    speculative_canary: str = _option(
        "warn",
        _SPECULATION,
        "when the draft fails its trial at start: an ERROR line, no start, or no trial",
        choices=("warn", "fail", "off"),
    )
    speculative_shadow_rate: float = _option(
        0.0, _SPECULATION, "share of finished requests to score again without drafts", least=0, most=1
    )

    host: str = _option("127.0.0.1", _HTTP, "address to listen on")
    port: int = _option(30000, _HTTP, "port to listen on; 0 picks a free one", least=0, most=65535)
    api_key: str | None = _option(None, _HTTP, "key that requests must carry", kind=str, is_secret=True)
    admin_api_key: str | None = _option(
        None, _HTTP, "key for /flush_cache and /abort_request", kind=str, is_secret=True
    )
    allowed_origins: str | None = _option(
        None,
        _HTTP,
        "origins of web pages whose scripts may call and read, with commas between; *: any; default: none",
        kind=str,
    )
    enable_metrics: bool = _option(True, _HTTP, "serve Prometheus metrics at /metrics")
    stream_interval: int = _option(1, _HTTP, "tokens gathered before a chunk is sent", least=1)
    tool_call_parser: str | None = _option(
        None,
        _HTTP,
        "as other servers want it; calls of both formats are read wherever a request has tools",
        choices=("glm45", "glm47"),
        kind=str,
    )
    grammar_backend: str = _option(
        "llguidance", _HTTP, "what holds answers to a schema or a grammar", choices=("llguidance", "none")
    )
    reasoning_parser: str | None = _option(None, _HTTP, "separate <think> text", choices=("glm45",), kind=str)

    max_body_bytes: int = _option(16 * 2**20, _LIMITS, "largest request body", least=1024)
    max_choices: int = _option(64, _LIMITS, "largest n", least=1)
    max_stop_sequences: int = _option(16, _LIMITS, "most stop strings of a request", least=1)

    log_level: str = _option("info", _RUNTIME, "how much to log", choices=("debug", "info", "warning", "error"))
    random_seed: int = _option(0, _RUNTIME, "seeds requests that bring no seed, and dummy weights", least=0)
    num_threads: int | None = _option(
        None, _RUNTIME, "CPU threads of the engine; default: by model size", kind=int, least=1, most=1024
    )
    startup_timeout: float = _option(1800.0, _RUNTIME, "seconds that loading may take", least=1)
    watchdog_timeout: float = _option(300.0, _RUNTIME, "seconds a step may take before the server gives up", least=1)
    shutdown_timeout: float = _option(10.0, _RUNTIME, "seconds that running requests get to finish at the end", least=0)

    def __post_init__(self) -> None:
        for name, (option, default) in _options().items():
            value = getattr(self, name)
            if value is not None or default is not None:
                object.__setattr__(self, name, option.parse(value, flag_of(name)))
        if self.chunked_prefill_size == 0:
            raise ConfigError("--chunked-prefill-size: found 0, expected at least 1, or -1 for whole prompts")
        if self.speculative_eagle_topk not in (None, 1):
            raise ConfigError(
                f"--speculative-eagle-topk: found {self.speculative_eagle_topk}, expected 1: the NextN layer drafts a "
                "chain, not a tree"
            )
        if self.speculative_algorithm == "none":
            self._check_nothing_speculative()
        self._check_num_draft_tokens()
        self._check_nodes()
        if self.max_total_tokens is not None and self.max_total_tokens < 2 * self.page_size:
            raise ConfigError(
                f"--max-total-tokens: found {self.max_total_tokens}, expected at least two pages of --page-size "
                f"({2 * self.page_size})"
            )
        if self.skip_tokenizer_init and (self.tool_call_parser or self.reasoning_parser or self.chat_template):
            raise ConfigError("--skip-tokenizer-init: leaves no text for a parser or a chat template; leave one out")

    def _check_nodes(self) -> None:
        if self.tp_size % self.nnodes:
            raise ConfigError(f"--tp-size: found {self.tp_size}, expected a multiple of --nnodes {self.nnodes}")
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"--node-rank: found {self.node_rank}, expected less than --nnodes {self.nnodes}")
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise ConfigError("--dist-init-addr: found nothing, expected HOST:PORT of node 0, the same on all nodes")
        if self.dist_init_addr is not None:
            host, _, port = self.dist_init_addr.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ConfigError(f"--dist-init-addr: found {self.dist_init_addr!r}, expected HOST:PORT of node 0")

    def _check_nothing_speculative(self) -> None:
        meaningless: dict[str, Any] = {
            "speculative_num_steps": (None, 0),
            "speculative_num_draft_tokens": (None, 1),
            "speculative_draft_model_path": (None,),
            "speculative_draft_model_quantization": (None, UNSET),
            "speculative_draft_head": ("auto",),
            "speculative_canary": ("warn", "off"),
        }
        for name, allowed in meaningless.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(
                    f"{flag_of(name)}: found {value} together with --speculative-algorithm none; leave one out"
                )

    def _check_num_draft_tokens(self) -> None:
        steps, tokens = self.speculative_num_steps, self.speculative_num_draft_tokens
        if steps is not None and tokens not in (None, steps + 1):
            raise ConfigError(
                f"--speculative-num-draft-tokens: found {self.speculative_num_draft_tokens}, expected {steps + 1}: the "
                f"drafts of {steps} steps and the token before them"
            )

    @classmethod
    def from_cli(cls, argv: Sequence[str], environ: Mapping[str, str]) -> ServerArgs:
        """Flags over environment variables (NEXTN_…) over the YAML file of --config over defaults.

        ``--help`` prints and exits. Raises ConfigError naming the flag, variable or key, the value and what is allowed.
        """
        return cls(**read_sources("python -m nextn.launch_server", _options(), argv, environ))

    def engine_config(self, model_path: str) -> EngineConfig:
        """The engine's part. ``model_path``: the resolved folder."""
        override = self.speculative_draft_model_quantization
        return EngineConfig(
            model_path=model_path,
            draft_model_path=self.speculative_draft_model_path,
            load_format=_literal(self.load_format),
            device=_literal(self.device),
            dtype=_literal(self.dtype),
            kv_cache_dtype=_literal(self.kv_cache_dtype),
            batch_invariant=self.enable_deterministic_inference,
            mem_fraction_static=self.mem_fraction_static,
            cuda_graph_max_bs=self.cuda_graph_max_bs,
            enable_cuda_graph=not self.disable_cuda_graph,
            enable_overlap=not self.disable_overlap_schedule,
            quantization=self.quantization,
            draft_quantization=None if override == UNSET else override,
            draft_head=_literal(self.speculative_draft_head),
            context_length=self.context_length,
            max_running_requests=self.max_running_requests,
            max_queued_requests=self.max_queued_requests,
            max_total_tokens=self.max_total_tokens,
            chunked_prefill_size=self.chunked_prefill_size,
            schedule_policy=_literal(self.schedule_policy),
            page_size=self.page_size,
            enable_prefix_cache=not self.disable_radix_cache,
            num_draft_steps=self._num_draft_steps,
            tokenizer_path=self.tokenizer_path,
            serves_grammars=self.serves_grammars,
            canary=_literal(self.speculative_canary),
            shadow_rate=self.speculative_shadow_rate,
            random_seed=self.random_seed,
        )

    @property
    def _num_draft_steps(self) -> int | None:
        """None leaves it to what is measured."""
        if self.speculative_algorithm == "none":
            return 0
        if self.speculative_num_steps is not None:
            return self.speculative_num_steps
        if self.speculative_num_draft_tokens is not None:
            return self.speculative_num_draft_tokens - 1
        return DEFAULT_DRAFT_STEPS if self.speculative_algorithm in NEXTN_ALGORITHMS else None

    @property
    def serves_grammars(self) -> bool:
        return self.grammar_backend != "none" and not self.skip_tokenizer_init

    @property
    def max_requests_in_flight(self) -> int:
        """Requests that can run and wait together."""
        return self.max_running_requests + self.max_queued_requests

    def redacted(self) -> dict[str, Any]:
        """All values, the keys hidden; for /get_server_info."""
        hidden = {name: "***" for name in ("api_key", "admin_api_key") if getattr(self, name) is not None}
        return {**asdict(self), **hidden}


def _options() -> dict[str, tuple[Option, Any]]:
    """Field name → option and default."""
    return {f.name: (f.metadata["option"], f.default) for f in fields(ServerArgs)}


def _literal(value: str) -> Any:
    """A string whose choices were checked when it was read."""
    return value
