"""Other kernels that can be tuned, and decoder layers in a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
from nextn.checkpoint.dummy import fill_dummy
from nextn.config.model_config import ModelConfig
from nextn.kernels import gpu, paged_attention_triton, router
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.gpu import cdiv
from nextn.kernels.linear import PackedWeight
from nextn.kernels.moe_combine import ExpertTerms, moe_combine
from nextn.kernels.paged_attention import make_attention_layout, paged_attention
from nextn.kernels.paged_attention_triton import AttentionConfig
from nextn.kernels.rope_and_cache import Rotation
from nextn.kernels.rotary import make_rotary_table
from nextn.kernels.router import MAX_TOKEN_TILES, RouterConfig, route
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.layers.norm import Stream
from nextn.layers.prepare import prepare_weights
from nextn.models.glm4_moe import Glm4MoeDecoderLayer
from nextn.quantization.compressed_tensors import CompressedTensorsConfig

from benchmarks.gpu import attention
from benchmarks.gpu.candidates import (
    PREFETCHES,
    Axes,
    Copies,
    Knobs,
    Patches,
    Work,
    around,
    config_of_knobs,
    powers,
    using,
)
from benchmarks.gpu.floors import kv_bytes, moe_layer_bytes, touched_experts
from benchmarks.gpu.place import check
from benchmarks.gpu.row import Machine


@dataclass(frozen=True)
class Attention:
    """A decode step's, of one new token per sequence over full pages."""

    config: ModelConfig
    batch: int
    context: int
    kv_dtype: torch.dtype

    @property
    def family(self) -> str:
        return "decode attention"

    @property
    def what(self) -> str:
        kind = "FP8" if self.kv_dtype == FP8 else "BF16"
        return f"{self.family}, batch {self.batch}, {self.context} tokens, {kind} KV"

    def chosen(self, machine: Machine) -> Knobs:
        config = self.config
        made = paged_attention_triton.choose_config(
            *(config.num_attention_heads // config.num_key_value_heads, config.head_dim),
            *(torch.bfloat16, self.kv_dtype, machine.shared_memory),
            batch_invariant=False,
        )
        names = ("MIN_PART", "ITEMS_PER_PROCESSOR", "PARTS_AT_ONCE")
        return {**asdict(made), **{name.lower(): getattr(paged_attention_triton, name) for name in names}}

    def axes(self, chosen: Knobs) -> Axes:
        return [
            {"block_n": (32, 64, 128, 256)},
            {"block_n": (64, 128), "num_stages": (2, 3, 4)},
            {"num_stages": (2, 3, 4, 5)},
            {"num_warps": (2, 4, 8)},
            {"min_part": (1, 2, 4, 8, 16)},
            {"items_per_processor": (2, 3, 4, 6, 8, 12)},
            {"parts_at_once": (8, 16, 32)},
        ]

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        step = 2 * knobs["block_n"] * self.config.head_dim * self.kv_dtype.itemsize
        return step * (knobs["num_stages"] - 1) <= machine.shared_memory

    def patches(self, knobs: Knobs) -> Patches:
        names = ("min_part", "items_per_processor", "parts_at_once")
        constants = [(paged_attention_triton, name.upper(), knobs[name]) for name in names]
        return (paged_attention_triton, "choose_config", config_of_knobs(AttentionConfig, knobs)), *constants

    def work(self, device: torch.device, copies: Copies) -> Work:
        config, num_pages = self.config, self.context // attention.PAGE_SIZE
        shape = (self.batch * num_pages, attention.PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        num_bytes = kv_bytes(config, self.batch * self.context, self.kv_dtype.itemsize)
        first = [torch.randn(shape, device=device, dtype=torch.bfloat16).to(self.kv_dtype) for _ in range(2)]
        caches = [first, *([one.clone() for one in first] for _ in range(copies(num_bytes) - 1))]
        spans, order = [(self.context - 1, 1)] * self.batch, torch.randperm(self.batch * num_pages)
        pages = order.view(self.batch, num_pages).tolist()
        layout = make_attention_layout(spans, pages, attention.PAGE_SIZE, device)
        q = torch.randn(self.batch, config.num_attention_heads, config.head_dim, device=device, dtype=torch.bfloat16)
        scale = config.head_dim**-0.5

        def right(got: torch.Tensor) -> None:
            check(got, attention.exact(q, first[0], first[1], layout, scale), attention.TOLERANCE, self.what)

        return Work(
            lambda knobs: [partial(paged_attention, q, *cache, layout, scale) for cache in caches],
            right,
            num_bytes,
            4 * self.batch * self.context * config.num_attention_heads * config.head_dim,
        )


@dataclass(frozen=True)
class Router:
    """Scores and the choice of experts."""

    config: ModelConfig
    m: int

    @property
    def family(self) -> str:
        return "router"

    @property
    def what(self) -> str:
        return f"router, {self.config.n_routed_experts} × {self.config.hidden_size}, M = {self.m}"

    def chosen(self, machine: Machine) -> Knobs:
        shape = (self.m, self.config.n_routed_experts, self.config.hidden_size)
        return asdict(router.choose_config(*shape, machine.processors, batch_invariant=False))

    def axes(self, chosen: Knobs) -> Axes:
        return [
            {"block_m": around(chosen["block_m"], 16, 64)},
            {"block_e": around(chosen["block_e"], 16, 64), "split_k": around(chosen["split_k"], 1, 32)},
            {"split_k": powers(32)},
            {"block_k": around(chosen["block_k"], 32, 128), "num_stages": (4, chosen["num_stages"])},
            {"num_stages": (2, 3, 4, 6, 9)},
        ]

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        step = (knobs["block_m"] * 2 + knobs["block_e"] * 4) * knobs["block_k"]
        return step * (knobs["num_stages"] - 1) <= machine.shared_memory

    def patches(self, knobs: Knobs) -> Patches:
        return ((router, "choose_config", config_of_knobs(RouterConfig, knobs)),)

    def work(self, device: torch.device, copies: Copies) -> Work:
        config, hidden = self.config, self.config.hidden_size
        num_experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        num_bytes = num_experts * hidden * 4
        x = torch.randn(self.m, hidden, device=device, dtype=torch.bfloat16)
        gates = [torch.randn(num_experts, hidden, device=device) / hidden**0.5 for _ in range(copies(num_bytes))]
        bias = 0.1 * torch.randn(num_experts, device=device)
        counters = torch.zeros(MAX_TOKEN_TILES, dtype=torch.int32, device=device)

        def right(got: tuple[torch.Tensor, torch.Tensor]) -> None:
            weights, ids = got
            scores = (x.double() @ gates[0].double().t()).sigmoid()
            chosen = scores.gather(1, ids)
            expected = chosen / chosen.sum(1, keepdim=True) * config.routed_scaling_factor
            check(weights, expected, 1e-4, f"weights, {self.what}")
            biased, best = scores + bias, (scores + bias).topk(top_k).values
            check(biased.gather(1, ids).sort(1, descending=True).values, best, 1e-4, f"choice, {self.what}")

        return Work(
            lambda knobs: [
                partial(
                    *(route, x, PackedWeight(gate, gate.t(), None), bias),
                    top_k=top_k,
                    n_group=1,
                    topk_group=1,
                    norm_topk_prob=True,
                    routed_scaling_factor=config.routed_scaling_factor,
                    counters=counters,
                )
                for gate in gates
            ],
            right,
            num_bytes,
            2 * self.m * num_experts * hidden,
        )


NOTHING_EARLY: Knobs = {"early": 0, "prefetch": 0, "ahead": 0}
AHEAD = (0, 8 << 20, 16 << 20, 32 << 20)


@dataclass(frozen=True)
class Layers:
    """Decoder layers in a row, in which every kernel has another one before it.

    Knobs: ``early``, whether a kernel's programs start before its predecessor ends; ``prefetch``, PREFETCH_BYTES;
    ``ahead``, AHEAD_BYTES of attention
    can_start_early: whether the card can
    """

    config: ModelConfig
    m: int
    context: int
    can_start_early: bool

    @property
    def family(self) -> str:
        return "decoder layers in a row"

    @property
    def what(self) -> str:
        return f"{self.num_layers} {self.family}, {self.m} sequences"

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers - self.config.first_k_dense_replace

    def chosen(self, machine: Machine) -> Knobs:
        if not self.can_start_early:
            return NOTHING_EARLY
        return {"early": 1, "prefetch": gpu.PREFETCH_BYTES, "ahead": paged_attention_triton.AHEAD_BYTES}

    def axes(self, chosen: Knobs) -> Axes:
        if not self.can_start_early:
            return []
        return [{"prefetch": PREFETCHES}, {"ahead": AHEAD}, dict.fromkeys(NOTHING_EARLY, (0,))]

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        return True

    def patches(self, knobs: Knobs) -> Patches:
        return (
            (gpu, "PREFETCH_BYTES", knobs["prefetch"]),
            (paged_attention_triton, "AHEAD_BYTES", knobs["ahead"]),
            (gpu, "starts_early", lambda device: bool(knobs["early"])),
        )

    def work(self, device: torch.device, copies: Copies) -> Work:
        config = self.config
        dtype = torch.bfloat16 if gpu.suits(torch.empty(0, device=device)) else torch.float32
        quantization = CompressedTensorsConfig.from_dict(config.quantization_config or {}, "config.json")
        first = config.first_k_dense_replace
        with device:
            layers = [
                Glm4MoeDecoderLayer(config, quantization, f"model.layers.{i}", i, dtype)
                for i in range(first, config.num_hidden_layers)
            ]
        for layer in layers:
            if device.type != "meta":
                fill_dummy(layer.weight_slots(), 0)
            prepare_weights(layer)
        num_pages = cdiv(self.context, attention.PAGE_SIZE)
        shape = (config.num_hidden_layers, self.m * num_pages, attention.PAGE_SIZE)
        heads = (config.num_key_value_heads, config.head_dim)
        k, v = (torch.randn(*shape, *heads, device=device, dtype=dtype) for _ in range(2))
        kv_cache = KVCache(k, v)
        spans = [(self.context - 1, 1)] * self.m
        pages = [list(range(i * num_pages, (i + 1) * num_pages)) for i in range(self.m)]
        batch = make_extend_batch(spans, pages, attention.PAGE_SIZE, device)
        table = make_rotary_table(config.head_dim, config.rotary_dim, config.rope_theta, self.context, device)
        rotation = Rotation(table, batch.positions, dtype)
        x = torch.randn(self.m, config.hidden_size, device=device, dtype=dtype)

        def step() -> torch.Tensor:
            hidden: Stream = x
            for layer in layers:
                hidden, normed = layer.normed(hidden)
                hidden = layer.forward(hidden, normed, rotation, batch, kv_cache)
            return moe_combine(hidden) if isinstance(hidden, ExpertTerms) else hidden

        with using(self, NOTHING_EARLY):
            alone = step()

        def right(got: torch.Tensor) -> None:
            assert torch.equal(got, alone), f"{self.what}: another result where kernels wait for each other"

        touched = touched_experts(config, self.m)
        num_bytes = moe_layer_bytes(config, touched) + kv_bytes(config, self.m * self.context, 2)
        return Work(lambda knobs: [step], right, self.num_layers * num_bytes, 0)
