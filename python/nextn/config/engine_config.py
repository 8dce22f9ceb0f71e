"""What the engine needs to know: the part of the server's arguments that concerns the model and the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_NUM_DRAFT_STEPS = 5
"""The most drafts of a step."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Resolved once at the edge (flags, environment, YAML, or keyword arguments of ``nextn.LLM``).

    model_path: a folder in the Hugging Face layout
    draft_model_path: take the NextN layer from this folder instead of ``model_path``
    draft_quantization: None keeps what the loader detects; "unquant" dequantizes; else a method's name
    draft_head: whether drafts read the output head as FP8 or as it is stored; "auto" is FP8 where the NextN layer is
    device: "auto" is the GPU where there is one
    dtype: computing type of what is not quantized; "auto" is float32 on a CPU, bfloat16 on a GPU
    kv_cache_dtype: "auto" is the computing type
    batch_invariant: on a GPU, sum in an order that does not depend on what else is in the batch
    mem_fraction_static: share of a GPU's memory for weights, KV and what computing takes
    cuda_graph_max_bs: most sequences of a step that is recorded as a CUDA graph; None is max_running_requests
    enable_cuda_graph: whether decode steps are recorded; enable_overlap: whether the next is launched before the last
        one's tokens are read
    decode_on_device: take a GPU's way of decoding on a CPU too; slower there, for tests
    context_length: None takes max_position_embeddings
    max_total_tokens: KV slots in all; None picks a size from memory
    chunked_prefill_size: most prompt tokens computed in one step; -1 computes whole prompts; None is 512 on a CPU and
        4096 on a GPU
    tokenizer_path: folder of the tokenizer that the canary's text and grammars are for; None is model_path
    serves_grammars: whether outputs can be held to a grammar, where there is a tokenizer
    shadow_rate: share of finished requests that are scored again without speculation
    canary: what happens when the draft fails its trial at start; "off" has none
    num_draft_steps: drafts per step; None lets the policy choose, at most MAX_NUM_DRAFT_STEPS, where the
        checkpoint has a NextN layer
    """

    model_path: str
    draft_model_path: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    batch_invariant: bool = False
    mem_fraction_static: float = 0.9
    cuda_graph_max_bs: int | None = None
    enable_cuda_graph: bool = True
    enable_overlap: bool = True
    decode_on_device: bool = False
    quantization: str | None = None
    draft_quantization: str | None = None
    draft_head: Literal["auto", "fp8", "stored"] = "auto"
    context_length: int | None = None
    max_running_requests: int = 64
    max_queued_requests: int = 1024
    max_total_tokens: int | None = None
    chunked_prefill_size: int | None = None
    schedule_policy: Literal["fcfs", "priority"] = "fcfs"
    page_size: int = 16
    enable_prefix_cache: bool = True
    num_draft_steps: int | None = None
    tokenizer_path: str | None = None
    serves_grammars: bool = True
    canary: Literal["warn", "fail", "off"] = "warn"
    shadow_rate: float = 0.0
    random_seed: int = 0

    @property
    def wants_draft(self) -> bool | None:
        """Whether the NextN layer is loaded. True: it must be; False: no; None: where the checkpoint names one."""
        if self.num_draft_steps is None:
            return True if self.draft_model_path is not None else None
        return self.num_draft_steps > 0
