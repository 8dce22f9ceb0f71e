"""The Triton router against float64 scores, and the choice that they call for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nextn.kernels.linear import PackedWeight
from nextn.kernels.router import choose_config, route

OPTIONS = {"top_k": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}


def _route(
    x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return route(x, PackedWeight(gate, gate.t(), None), bias, **{**OPTIONS, **options})


def _well_apart(num_tokens: int, num_experts: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, gate and bias. Nearly equal scores may be chosen either way: tokens that have some are drawn again."""
    gate, bias = torch.randn(num_experts, hidden) / hidden**0.5, torch.randn(num_experts)
    x = torch.randn(num_tokens * 8 + 64, hidden).bfloat16()
    biased = (x.double() @ gate.double().T).sigmoid() + bias.double()
    gap = biased.sort(1).values.diff(dim=1).amin(1)
    return x[gap > 2e-6][:num_tokens], gate, bias


def _expected(
    x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64; weights and ids in the order of the biased scores."""
    options = {**OPTIONS, **options}
    scores = (x.double() @ gate.double().T).sigmoid()
    biased = scores + bias.double()
    grouped = biased.view(len(x), options["n_group"], -1)
    if options["n_group"] > 1:
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(options["topk_group"], dim=-1).indices
        inside = torch.zeros(grouped.shape[:2]).scatter_(1, best, 1.0).bool()
        biased = grouped.masked_fill(~inside[:, :, None], float("-inf")).view(len(x), -1)
    ids = biased.topk(options["top_k"], dim=-1).indices
    weights = scores.gather(1, ids)
    if options["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * options["routed_scaling_factor"], ids


@pytest.mark.parametrize(
    ("num_experts", "n_group", "topk_group", "top_k"),
    [(4, 1, 1, 1), (16, 4, 2, 3), (20, 5, 4, 8), (160, 1, 1, 8), (128, 1, 1, 8)],
)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 128), (3, 200), (17, 1152), (300, 64)])
def test_experts_and_weights(
    num_tokens: int, hidden: int, num_experts: int, n_group: int, topk_group: int, top_k: int, device: torch.device
) -> None:
    x, gate, bias = _well_apart(num_tokens, num_experts, hidden)
    options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group, "norm_topk_prob": top_k % 2 == 0}
    expected_weights, expected_ids = _expected(x, gate, bias, options)
    weights, ids = _route(x.to(device), gate.to(device), bias.to(device), **options)
    assert torch.equal(ids.cpu(), expected_ids)
    assert weights.dtype == torch.float32
    # float32 sums, and an exponential.
    torch.testing.assert_close(weights.cpu().double(), expected_weights, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_multiplied_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    x, gate, bias = _well_apart(5, 16, 96)
    x = x.to(dtype)
    weights, ids = _route(x.to(device), gate.to(device), bias.to(device))
    expected_weights, expected_ids = _expected(x, gate, bias, {})
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu().double(), expected_weights, rtol=5e-6, atol=0)


def test_the_gate_keeps_all_bits_of_float32(device: torch.device) -> None:
    """Two experts whose gates differ in one last bit, which remains when all else cancels."""
    gate = torch.ones(2, 256)
    gate[1, 0] += 2**-23
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    x[0, 0], x[0, 200] = 1024, -1024
    options = {"top_k": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    weights, ids = _route(x.to(device), gate.to(device), torch.zeros(2, device=device), **options)
    assert ids.tolist() == [[1, 0]]
    assert weights[0].tolist() == pytest.approx([0.5 + 2**-15, 0.5], abs=2**-23)


def test_ties_go_to_the_lower_expert(device: torch.device) -> None:
    gate, bias = torch.zeros(12, 32, device=device), torch.zeros(12, device=device)
    bias[7] = 1
    _, ids = _route(torch.randn(4, 32, device=device).bfloat16(), gate, bias)
    assert ids.tolist() == [[7, 0, 1]] * 4


def test_a_token_that_is_not_a_number_gets_experts_that_exist(device: torch.device) -> None:
    gate, bias = torch.randn(12, 32, device=device), torch.randn(12, device=device)
    x = torch.randn(3, 32, device=device).bfloat16()
    _, clean = _route(x, gate, bias)
    x[1] = float("nan")
    _, ids = _route(x, gate, bias)
    assert ids[1].tolist() == [0, 1, 2]
    assert torch.equal(ids[::2], clean[::2])


def test_the_counters_are_ready_for_the_next_call(device: torch.device) -> None:
    x, gate, bias = (t.to(device) for t in _well_apart(40, 160, 1024))
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    first = _route(x, gate, bias, counters=counters)
    assert not counters.any()
    for one, other in zip(first, _route(x, gate, bias, counters=counters), strict=True):
        assert torch.equal(one, other)


def test_batch_invariance_is_exact(device: torch.device) -> None:
    x, gate, bias = (t.to(device) for t in _well_apart(70, 40, 1024))
    weights, ids = _route(x, gate, bias, top_k=8, batch_invariant=True)
    for rows in (slice(0, 1), slice(5, 23), *(slice(row, row + 1) for row in range(62, 70))):
        some_weights, some_ids = _route(x[rows], gate, bias, top_k=8, batch_invariant=True)
        assert torch.equal(some_weights, weights[rows])
        assert torch.equal(some_ids, ids[rows])


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    x = torch.empty(0, 32, dtype=torch.bfloat16, device=device)
    weights, ids = _route(x, torch.zeros(8, 32, device=device), torch.zeros(8, device=device))
    assert weights.shape == ids.shape == (0, 3)


def test_few_tokens_split_the_gate_so_that_the_card_is_busy() -> None:
    for num_experts, hidden in [(128, 4096), (160, 5120)]:
        config = choose_config(1, num_experts, hidden, 132, batch_invariant=False)
        assert 60 <= -(-num_experts // config.block_e) * config.split_k <= 132
        assert choose_config(8192, num_experts, hidden, 132, batch_invariant=False).split_k == 1
