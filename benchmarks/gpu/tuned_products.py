"""Products with weights that can be tuned: of dense linears, and of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from nextn.config.model_config import ModelConfig
from nextn.kernels import fused_moe, gpu, matmul_plan, moe_matmul
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.gpu import cdiv
from nextn.kernels.matmul import matmul
from nextn.kernels.matmul_config import MAX_TILES, SMALL_M, MatmulConfig, choose_config, num_tiles
from nextn.kernels.moe_align import moe_align
from nextn.kernels.moe_matmul import MoeConfig, expert_matmul

from benchmarks.gpu import matmul as products
from benchmarks.gpu import moe
from benchmarks.gpu.candidates import (
    NUM_WARPS,
    PREFETCHES,
    Axes,
    Copies,
    Knobs,
    Patches,
    Work,
    around,
    config_of_knobs,
    powers,
)
from benchmarks.gpu.floors import touched_experts
from benchmarks.gpu.place import check
from benchmarks.gpu.row import Machine


@dataclass(frozen=True)
class Product:
    """x [m, k] · weight [n, k]ᵀ; the weight in FP8 with a scale per channel or per ``block``, or in BF16."""

    name: str
    m: int
    n: int
    k: int
    is_fp8: bool = True
    block: tuple[int, int] | None = None

    @property
    def family(self) -> str:
        kind = "BF16" if not self.is_fp8 else "W8A8" if self.block is None else "block-FP8"
        return f"{kind} products, M {'≤' if self.m <= SMALL_M else '>'} {SMALL_M}"

    @property
    def what(self) -> str:
        return f"{self.name}, {self.n} × {self.k}, M = {self.m}"

    @property
    def element_size(self) -> int:
        return 1 if self.is_fp8 else 2

    def chosen(self, machine: Machine) -> Knobs:
        size = self.element_size
        config = choose_config(
            self.m,
            self.n,
            self.k,
            x_bytes=size,
            weight_bytes=size,
            has_groups=self.block is not None,
            processors=machine.processors,
            shared_memory=machine.shared_memory,
        )
        return {**asdict(config), "prefetch": gpu.PREFETCH_BYTES if self.m <= SMALL_M else 0}

    def axes(self, chosen: Knobs) -> Axes:
        few = self.m <= SMALL_M
        splits = around(chosen["split_k"], 1, 16)
        block_m = around(chosen["block_m"], 16, 128) if self.m >= SMALL_M else (chosen["block_m"],)
        return [
            {"block_n": (32, 64, 128) if few else (64, 128, 256), "split_k": splits},
            {"block_m": block_m, "block_n": (64, 128, 256), "num_warps": NUM_WARPS},
            {"num_stages": (2, 3, 4, 5, 6)},
            {"split_k": powers(16 if few else 4)},
            {"block_k": around(chosen["block_k"], 64, 256), "num_stages": (3, 4)},
            {"transposed": (False, True), "block_n": (64, 128)},
            {"prefetch": PREFETCHES if few else (0,)},
        ]

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        step = (knobs["block_m"] + knobs["block_n"]) * self.element_size * knobs["block_k"]
        tiles = num_tiles(self.m, self.n, knobs["block_m"], knobs["block_n"])
        return (
            step * knobs["num_stages"] <= machine.shared_memory
            and (knobs["split_k"] == 1 or tiles <= MAX_TILES)
            and knobs["split_k"] <= cdiv(self.k, knobs["block_k"])
            # A warp's 32 threads keep a step's sum and the total, 255 registers each at most.
            and knobs["block_m"] * knobs["block_n"] <= 64 * 32 * knobs["num_warps"]
        )

    def patches(self, knobs: Knobs) -> Patches:
        return (
            (matmul_plan, "choose_config", config_of_knobs(MatmulConfig, knobs)),
            (gpu, "PREFETCH_BYTES", knobs["prefetch"]),
        )

    def work(self, device: torch.device, copies: Copies) -> Work:
        m, n, k = self.m, self.n, self.k
        num_bytes = n * k * self.element_size
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        x_scale = scale = None
        if self.is_fp8:
            x = (64 * x).clamp(-448, 448).to(FP8)
            group = self.block or (1, k)
            x_scale = _scales(m, cdiv(k, group[1]), device=device)
            scale = _scales(cdiv(n, group[0]), cdiv(k, group[1]), device=device)
            weights = [_codes(n, k, device=device) for _ in range(copies(num_bytes))]
        else:
            weights = [
                torch.randn(n, k, device=device, dtype=torch.bfloat16).div_(k**0.5) for _ in range(copies(num_bytes))
            ]
        out = torch.bfloat16 if self.is_fp8 else torch.float32

        def exact() -> torch.Tensor:
            wide, weight = x.double(), weights[0].double()
            if x_scale is not None and scale is not None:
                wide *= x_scale.repeat_interleave(cdiv(k, x_scale.shape[1]), 1)[:, :k]
                rows, columns = self.block or (1, k)
                weight *= scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
            return wide @ weight.t()

        def calls(knobs: Knobs) -> list[Callable[[], torch.Tensor]]:
            return [
                partial(matmul, x, x_scale, weight, scale, self.block, out_dtype=out, counters=counters)
                for weight in weights
            ]

        return Work(calls, lambda got: check(got, exact(), products.TOLERANCE, self.what), num_bytes, 2 * m * n * k)


@dataclass(frozen=True)
class Expert:
    """One of the experts' two products, in FP8 with a scale per channel. inner: their width, of a rank's share"""

    name: str
    config: ModelConfig
    m: int
    inner: int
    swiglu: bool

    @property
    def family(self) -> str:
        return f"experts' {'w13' if self.swiglu else 'w2'}"

    @property
    def what(self) -> str:
        return f"{self.family}, {self.name}, inner size {self.inner}, M = {self.m}"

    def chosen(self, machine: Machine) -> Knobs:
        config = self.config
        made = fused_moe.choose_config(
            self.m, config.num_experts_per_tok, config.n_routed_experts, None, batch_invariant=False
        )
        prefetch = gpu.PREFETCH_BYTES if made.transposed and not self.swiglu else 0
        return {**asdict(made), "block_k": moe_matmul.BLOCK_K_BYTES, "prefetch": prefetch}

    def axes(self, chosen: Knobs) -> Axes:
        prefetches = PREFETCHES if chosen["prefetch"] else (0,)
        block_m = around(chosen["block_m"], 16, 128) if self.m > 1 else (chosen["block_m"],)
        return [
            {"num_stages": (2, 3, 4, 6)},
            {"block_n": (32, 64, 128), "num_warps": NUM_WARPS, "block_m": block_m},
            {"block_k": (64, 128, 256), "num_stages": (2, 4)},
            {"transposed": (False, True), "block_n": (64, 128), "block_m": block_m},
            {"prefetch": prefetches},
        ]

    def fits(self, knobs: Knobs, machine: Machine) -> bool:
        step = (knobs["block_m"] + knobs["block_n"]) * knobs["block_k"]
        return (
            step * knobs["num_stages"] <= machine.shared_memory
            and knobs["block_m"] * knobs["block_n"] <= 64 * 32 * knobs["num_warps"]
            and (knobs["block_m"] >= SMALL_M or bool(knobs["transposed"]))
        )

    def patches(self, knobs: Knobs) -> Patches:
        return (moe_matmul, "BLOCK_K_BYTES", knobs["block_k"]), (gpu, "PREFETCH_BYTES", knobs["prefetch"])

    def work(self, device: torch.device, copies: Copies) -> Work:
        config, m = self.config, self.m
        num_routed, per_token = config.n_routed_experts, config.num_experts_per_tok + 1
        n, k = (2 * self.inner, config.hidden_size) if self.swiglu else (config.hidden_size, self.inner)
        weight = torch.empty(num_routed + 1, n, k, dtype=FP8, device=device)
        for one in weight:
            one.copy_(_codes(n, k, device=device))
        scale = _scales(num_routed + 1, n, 1, device=device) / (64 * k**0.5)
        num_rows = m if self.swiglu else m * per_token
        x = (64 * torch.randn(num_rows, k, device=device)).clamp(-448, 448).to(FP8)
        x_scale = _scales(num_rows, 1, device=device)
        num_bytes = (touched_experts(config, m) + 1) * n * k
        ids = [
            torch.rand(m, num_routed, device=device).topk(per_token - 1).indices for _ in range(copies(int(num_bytes)))
        ]

        def exact() -> torch.Tensor:
            out = torch.empty(m * per_token, self.inner if self.swiglu else n, dtype=torch.float64, device=device)
            experts = F.pad(ids[0], (0, 1), value=num_routed).flatten()
            for expert in experts.unique().tolist():
                pairs = (experts == expert).nonzero()[:, 0]
                rows = pairs // per_token if self.swiglu else pairs
                found = (x[rows].double() * x_scale[rows]) @ (weight[expert].double() * scale[expert]).t()
                if self.swiglu:
                    gate, up = found.chunk(2, 1)
                    found = F.silu(gate) * up
                out[pairs] = found
            return out

        def calls(knobs: Knobs) -> list[Callable[[], torch.Tensor]]:
            aligned = [moe_align(one, num_routed, knobs["block_m"], has_shared=True) for one in ids]
            taken = config_of_knobs(MoeConfig, knobs)()
            return [
                partial(
                    *(expert_matmul, x, x_scale, weight, scale, None, one, taken),
                    swiglu=self.swiglu,
                    out_dtype=torch.bfloat16,
                    experts_are_old=not self.swiglu,
                )
                for one in aligned
            ]

        flops = 2 * m * per_token * n * k
        return Work(calls, lambda got: check(got, exact(), moe.TOLERANCE, self.what), num_bytes, flops)


def _codes(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).to(FP8)


def _scales(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.rand(shape, device=device) + 0.5
