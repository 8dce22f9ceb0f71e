"""Partial rotary embedding against transformers' Glm4Moe."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels.rotary import apply_rotary, make_rotary_table
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_heads_are_rotated_as_transformers_rotates_them(fraction: float, head_dim: int, theta: float) -> None:
    config = Glm4MoeConfig(
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction},
    )
    positions = torch.tensor([0, 1, 2, 63, 64, 1000, 4095])
    q, k = torch.randn(len(positions), 6, head_dim), torch.randn(len(positions), 2, head_dim)
    cos, sin = Glm4MoeRotaryEmbedding(config)(q, positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    table = make_rotary_table(head_dim, int(head_dim * fraction), theta, 4096)
    rows = [part.index_select(0, positions).unsqueeze(1) for part in (table.cos, table.sin)]
    for x, expected in ((q, expected_q), (k, expected_k)):
        found = apply_rotary(x, *rows, table.partner)
        # Both hold angles up to 4,095 in float32, whose last bit there is 2.4e-4; they may round it in another order.
        torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=0, atol=1e-3)
        torch.testing.assert_close(found[:4], expected[0].transpose(0, 1)[:4], rtol=0, atol=2e-5)
        beyond = slice(int(head_dim * fraction), None)
        assert torch.equal(found[..., beyond], x[..., beyond])
        assert not torch.equal(found[1:], x[1:])


def test_scores_depend_on_distances_alone() -> None:
    table = make_rotary_table(32, 16, 10_000.0, 512)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(at: int, distance: int) -> float:
        turned = [
            apply_rotary(x, table.cos[p : p + 1, None], table.sin[p : p + 1, None], table.partner)
            for x, p in ((q, at), (k, at - distance))
        ]
        return float((turned[0] * turned[1]).sum())

    for distance in (0, 1, 17):
        assert score(400, distance) == pytest.approx(score(20, distance), abs=1e-3)
    assert score(400, 17) != pytest.approx(score(400, 1), abs=1e-3)


def test_bfloat16_stays_bfloat16() -> None:
    table = make_rotary_table(16, 8, 10_000.0, 8)
    x = torch.randn(3, 2, 16, dtype=torch.bfloat16)
    rows = [part[:3].unsqueeze(1).to(x.dtype) for part in (table.cos, table.sin)]
    assert apply_rotary(x, *rows, table.partner).dtype == torch.bfloat16
