"""W8A8 products against torch's, which call cuBLAS or CUTLASS, in the shapes of GLM-4.5-Air and GLM-4.6."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from nextn.config.model_config import ModelConfig
from nextn.kernels.fp8_quantize import FP8, quantize_per_channel, quantize_per_token
from nextn.kernels.matmul import w8a8_matmul, wide_matmul
from nextn.kernels.matmul_config import MAX_TILES

from benchmarks.gpu.place import Place, attempt, check, poisoned, those_that_run
from benchmarks.gpu.row import Goal, Outcome, Row
from benchmarks.gpu.shapes import config_of

FEW, MANY = (1, 4, 16, 64), (512, 2048, 8192)
FEW_GOAL, MANY_GOAL, HEAD_GOAL = Goal(at_least=1.0), Goal(at_least=0.85), Goal(at_least=1.0)
TOLERANCE = 0.05
"""Of the root mean square: bfloat16 rounds by up to 0.02 of it, and FP8 units add with 14 bits within 128 products."""
HEAD_TOLERANCE = 0.3
"""Of the root mean square: codes of 4 bits on both sides are off by 0.026 of it each."""


@dataclass(frozen=True)
class Product:
    """weight: [N, K] codes, in copies that are read in turn"""

    x: torch.Tensor
    x_scale: torch.Tensor
    weights: list[torch.Tensor]
    weight_scale: torch.Tensor
    counters: torch.Tensor

    def ours(self, weight: torch.Tensor) -> torch.Tensor:
        return w8a8_matmul(
            self.x, self.x_scale, weight, self.weight_scale, out_dtype=torch.bfloat16, counters=self.counters
        )

    def torchs(self, weight: torch.Tensor, *, use_fast_accum: bool) -> torch.Tensor:
        return torch._scaled_mm(
            self.x,
            weight.t(),
            self.x_scale,
            self.weight_scale.t().contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=use_fast_accum,
        )

    def exact(self, weight: torch.Tensor) -> torch.Tensor:
        wide = (self.x.double() * self.x_scale.double(), weight.double() * self.weight_scale.double())
        return wide[0] @ wide[1].t()


def measure(place: Place) -> Iterator[Outcome]:
    sizes = (*FEW, *MANY) if not place.is_rehearsal else (2, 70)
    with place.on_device():
        for done, m in enumerate(sizes):
            for name in ("glm-4.5-air", "glm-4.6"):
                place.check_time(3, f"{done} of {len(sizes)} numbers of rows")
                yield attempt(f"W8A8 products of a layer, {name}, M = {m}", partial(_row, place, name, m))
        place.check_time(3, "the products of layers")
        yield attempt("the head that drafts read", partial(_head_row, place, FEW if not place.is_rehearsal else (2,)))


def linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of the dense linears of a layer."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (queries + 2 * keys, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def _row(place: Place, name: str, m: int) -> Row:
    """All linears of a layer in a row of the table; the goal is for each of them."""
    details: list[dict[str, float | str]] = []
    for linear, (n, k) in linears(config_of(name, place)).items():
        product = _product(place, m, n, k)
        with poisoned():
            got = product.ours(product.weights[-1])
        check(got, product.exact(product.weights[-1]), TOLERANCE, f"{linear}, M = {m}")
        rivals = [partial(product.torchs, use_fast_accum=fast) for fast in (False, True)]
        sides = (product.ours, *those_that_run(rivals, product.weights[-1]))
        ours, *both = place.seconds_side_by_side(
            [[partial(side, weight) for weight in product.weights] for side in sides]
        )
        torchs = min(both)
        details.append(
            {
                "linear": linear,
                "M": m,
                "N": n,
                "K": k,
                "us": 1e6 * ours,
                "us of torch": 1e6 * torchs,
                "us of torch, both ways to accumulate": ", ".join(f"{1e6 * one:.1f}" for one in both),
                "ratio": torchs / ours,
                "GB/s": n * k / ours / 1e9,
                "TFLOP/s": 2 * m * n * k / ours / 1e12,
            }
        )
    worst = min(details, key=lambda one: float(one["ratio"]))
    ratios = [float(one["ratio"]) for one in details]
    return Row(
        f"W8A8 products of a layer, {name}, M = {m}",
        FEW_GOAL if m <= FEW[-1] else MANY_GOAL,
        sum(float(one["us"]) for one in details),
        "µs",
        min(ratios),
        sum(float(one["us of torch"]) for one in details),
        "torch._scaled_mm, the faster of its ways to accumulate",
        f"the ratio is {worst['linear']}'s, the least; their geometric mean {statistics.geometric_mean(ratios):.2f}",
        tuple(details),
    )


def _head_row(place: Place, sizes: tuple[int, ...]) -> Row:
    """GLM-4.5-Air's output head as drafts read it, quantizing their hidden states included."""
    config = config_of("glm-4.5-air", place)
    n, k, details = config.vocab_size, config.hidden_size, []
    wide = torch.randn(n, k, device=place.device, dtype=torch.bfloat16)
    codes, steps = quantize_per_channel(wide)
    for m in sizes:
        x = torch.randn(m, k, device=place.device, dtype=torch.bfloat16)

        def of_fp8(x: torch.Tensor = x) -> torch.Tensor:
            return w8a8_matmul(*quantize_per_token(x), codes, steps, out_dtype=torch.float32)

        def of_bf16(x: torch.Tensor = x) -> torch.Tensor:
            return wide_matmul(x, wide, out_dtype=torch.float32)

        check(of_fp8(), x.double() @ wide.double().t(), HEAD_TOLERANCE, f"the head as FP8, M = {m}")

        def of_torch(x: torch.Tensor = x) -> torch.Tensor:
            return F.linear(x, wide)

        ours, *both = place.seconds_side_by_side([[of_fp8], [of_bf16], [of_torch]])
        theirs = min(both)
        figures = {"M": m, "us": 1e6 * ours, "us of BF16": 1e6 * theirs, "ratio": theirs / ours}
        details.append({**figures, "GB/s": n * k / ours / 1e9})
    worst = min(details, key=lambda one: one["ratio"])
    return Row(
        f"the head that drafts read, GLM-4.5-Air, M = {sizes[0]} … {sizes[-1]}: FP8 against BF16",
        HEAD_GOAL,
        worst["us"],
        "µs",
        worst["ratio"],
        worst["us of BF16"],
        "BF16, the faster of torch and nextn",
        f"of M = {worst['M']:.0f}, the least; a half of the bytes",
        tuple(details),
    )


def _product(place: Place, m: int, n: int, k: int) -> Product:
    device = place.device
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16).to(FP8) for _ in range(place.copies_for(n * k))]
    return Product(
        (64 * torch.randn(m, k, device=device)).clamp(-448, 448).to(FP8),
        torch.rand(m, 1, device=device) + 0.5,
        weights,
        torch.rand(n, 1, device=device) + 0.5,
        torch.zeros(MAX_TILES, dtype=torch.int32, device=device),
    )
