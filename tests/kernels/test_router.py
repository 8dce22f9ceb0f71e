"""Expert selection against transformers' Glm4Moe router."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels import native
from nextn.kernels.linear import PackedWeight, pack_weight
from nextn.kernels.router import route
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

HIDDEN = 48


@pytest.mark.parametrize(
    ("num_experts", "n_group", "topk_group"), [(8, 1, 1), (16, 4, 2), (16, 2, 1), (20, 5, 4), (160, 1, 1)]
)
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("norm_topk_prob", "factor"), [(True, 2.5), (False, 1.0)])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
def test_experts_and_weights_are_those_of_transformers(
    num_experts: int, n_group: int, topk_group: int, top_k: int, norm_topk_prob: bool, factor: float, is_compiled: bool
) -> None:
    if is_compiled and native.cpu is None:
        pytest.skip("the installation had no C compiler")
    if top_k > num_experts // n_group * topk_group:
        pytest.skip("more than can be chosen from")
    config = Glm4MoeConfig(
        hidden_size=HIDDEN,
        n_routed_experts=num_experts,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=factor,
    )
    generator = torch.Generator().manual_seed(top_k)
    oracle = Glm4MoeTopkRouter(config)
    oracle.weight.data.copy_(torch.randn(num_experts, HIDDEN, generator=generator) / 4)
    oracle.e_score_correction_bias.copy_(torch.randn(num_experts, generator=generator))
    gate = oracle.weight.data.clone()
    packed = pack_weight(gate) if is_compiled else PackedWeight(gate, gate.t(), None)
    assert bool(packed.address) == is_compiled
    x = torch.randn(65, HIDDEN, generator=generator)
    weights, ids = route(
        x,
        packed,
        oracle.e_score_correction_bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=factor,
    )
    with torch.no_grad():
        _, expected_weights, expected_ids = oracle(x)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    # Neither side promises an order among the chosen.
    ids, order = ids.sort(1)
    expected_ids, expected_order = expected_ids.sort(1)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order), rtol=2e-6, atol=0)


def test_the_bias_steers_the_choice_and_leaves_the_weights() -> None:
    gate = torch.zeros(4, 2)
    gate[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    weights, ids = route(
        torch.tensor([[1.0, 0.0]]),
        PackedWeight(gate, gate.t(), None),
        bias,
        top_k=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen == pytest.approx({0: 1 / (1 + 2.718281828459045**-3), 3: 0.5})
