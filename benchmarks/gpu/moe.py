"""The fused mixture of experts in GLM-4.5-Air's shape, with random choice of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from nextn.config.model_config import ModelConfig
from nextn.kernels import gpu
from nextn.kernels.fp8_quantize import FP8, quantize_per_token
from nextn.kernels.fused_moe import StackedExperts, expert_terms
from nextn.kernels.moe_combine import moe_combine

from benchmarks.gpu.floors import expert_bytes
from benchmarks.gpu.place import Place, attempt, check, poisoned
from benchmarks.gpu.row import Goal, Outcome, Row
from benchmarks.gpu.shapes import config_of

FEW, MANY = (1, 4, 16, 64), 4096
FEW_GOAL, MANY_GOAL = Goal(at_least=0.75), Goal(at_least=0.5)
TOLERANCE = 0.3
"""Of the root mean square: between the two products activations are quantized anew, which adds noise of 0.026 of it."""


@dataclass(frozen=True)
class Choice:
    """ids: [M, top_k] int64, a token's all different; weights: [M, top_k] float32"""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def measure(place: Place) -> Iterator[Outcome]:
    config = config_of("glm-4.5-air", place)
    sizes = FEW if not place.is_rehearsal else (3,)
    many = MANY if not place.is_rehearsal else 12
    with place.on_device():
        experts = random_experts(config, place.device)
        for m in sizes:
            place.check_time(4, f"M < {m}")
            yield attempt(f"fused MoE, M = {m}", partial(_memory_row, place, config, experts, m))
        place.check_time(6, f"M ≤ {sizes[-1]}")
        yield attempt(f"fused MoE, M = {many}", partial(_arithmetic_row, place, config, experts, many))


def _memory_row(place: Place, config: ModelConfig, experts: StackedExperts, m: int) -> Row:
    """Draws in turn: what one has read is not in the cache when the next reads it, but for experts they share."""
    choices = [_choice(config, m, place.device) for _ in range(8 if m < 16 and not place.is_rehearsal else 3)]
    seconds = _checked_seconds(place, experts, choices, f"M = {m}")
    touched = sum(choice.ids.unique().numel() for choice in choices) / len(choices) + config.n_shared_experts
    speed = touched * expert_bytes(config) / seconds
    return Row(
        f"fused MoE, GLM-4.5-Air, M = {m}",
        FEW_GOAL,
        speed / 1e9,
        "GB/s",
        speed / place.copy_bandwidth,
        place.copy_bandwidth / 1e9,
        "copy bandwidth",
        f"{touched:.1f} experts read, {1e6 * seconds:.1f} µs",
    )


def _arithmetic_row(place: Place, config: ModelConfig, experts: StackedExperts, m: int) -> Row:
    choices = [_choice(config, m, place.device) for _ in range(2)]
    seconds = _checked_seconds(place, experts, choices, f"M = {m}")
    per_token = config.num_experts_per_tok + config.n_shared_experts
    flops = 2 * m * per_token * expert_bytes(config) / seconds
    return Row(
        f"fused MoE, GLM-4.5-Air, M = {m}",
        MANY_GOAL,
        flops / 1e12,
        "TFLOP/s",
        flops / place.fp8_flops,
        place.fp8_flops / 1e12,
        "dense FP8 product",
        f"{1e3 * seconds:.2f} ms",
    )


def _checked_seconds(place: Place, experts: StackedExperts, choices: list[Choice], what: str) -> float:
    first = choices[0]
    with poisoned():
        got = _fused_moe(first, experts)
    check(got, exact(first, experts), TOLERANCE, f"fused MoE, {what}")
    return place.seconds_per_call([partial(_fused_moe, one, experts) for one in choices])


def _fused_moe(choice: Choice, experts: StackedExperts) -> torch.Tensor:
    """With the weighted sum, which on one GPU the next norm makes while serving."""
    return moe_combine(expert_terms(choice.x, choice.ids, choice.weights, experts))


def random_experts(config: ModelConfig, device: torch.device) -> StackedExperts:
    """Routed experts and a shared one, of values that keep activations of order one."""
    num, hidden, inner = config.n_routed_experts + 1, config.hidden_size, config.moe_intermediate_size

    def stack(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(num, rows, columns, dtype=FP8, device=device)
        for one in codes:
            one.copy_(torch.randn(rows, columns, device=device, dtype=torch.bfloat16))
        return codes, (torch.rand(num, rows, 1, device=device) + 0.5) / columns**0.5

    w13, w13_scale = stack(2 * inner, hidden)
    w2, w2_scale = stack(hidden, inner)
    return StackedExperts(w13, w13_scale, w2, w2_scale, None, num_routed=num - 1, has_shared=True)


def _choice(config: ModelConfig, m: int, device: torch.device) -> Choice:
    ids = torch.rand(m, config.n_routed_experts, device=device).topk(config.num_experts_per_tok).indices
    weights = torch.rand(m, config.num_experts_per_tok, device=device) + 0.1
    x = torch.randn(m, config.hidden_size, device=device, dtype=torch.bfloat16)
    return Choice(x, ids, weights / weights.sum(-1, keepdim=True))


def exact(choice: Choice, experts: StackedExperts) -> torch.Tensor:
    """The same in float64, of the input as it is quantized. Returns [M, H]."""
    assert experts.w13_scale is not None, "the experts are quantized"
    assert experts.w2_scale is not None, "the experts are quantized"
    x = choice.x.double()
    if not gpu.suits(choice.x) or gpu.has_fp8_units(choice.x.device):
        codes, scale = quantize_per_token(choice.x)
        x = codes.double() * scale.double()
    every = torch.arange(x.shape[0], device=x.device)
    out = torch.zeros_like(x)
    for expert in [*choice.ids.unique().tolist(), experts.num_routed]:
        rows, columns = (choice.ids == expert).nonzero(as_tuple=True)
        weights = choice.weights[rows, columns].double()
        if expert == experts.num_routed:
            rows, weights = every, torch.ones_like(every, dtype=torch.float64)
        gate, up = (x[rows] @ (experts.w13[expert].double() * experts.w13_scale[expert].double()).t()).chunk(2, 1)
        down = (F.silu(gate) * up) @ (experts.w2[expert].double() * experts.w2_scale[expert].double()).t()
        out.index_add_(0, rows, down * weights[:, None])
    return out
