"""Memory of more than 2³¹ elements: a place in it is no int32. Only its last part is touched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.moe_align import MoeAlignment
from nextn.kernels.moe_matmul import MoeConfig, expert_matmul
from nextn.kernels.paged_attention import make_attention_layout, paged_attention
from nextn.kernels.rope_and_cache import Rotation, rope_and_cache
from nextn.kernels.rotary import make_rotary_table

from tests.kernels.references import has_fp8_units

BEYOND = 2**31 + 2**20
Bytes = Callable[[int], torch.Tensor]


@pytest.fixture
def zeros(device: torch.device) -> Bytes:
    """Bytes that the system provides as they are touched, where it can."""
    if device.type == "cuda":
        return lambda size: torch.zeros(size, dtype=torch.uint8, device=device)
    return lambda size: torch.from_numpy(np.zeros(size, dtype=np.uint8))


def test_keys_and_values_on_the_last_page_of_a_large_pool(device: torch.device, zeros: Bytes) -> None:
    page_size, head_dim, num_tokens = 64, 128, 5
    page_elements = page_size * head_dim
    k_cache, v_cache = (zeros(BEYOND).view(FP8).view(-1, page_size, 1, head_dim) for _ in range(2))
    last_page = BEYOND // page_elements - 1
    table = make_rotary_table(head_dim, head_dim // 2, 1e4, 64, device)
    positions = torch.arange(num_tokens, device=device)
    qkv = torch.randn(num_tokens, 4, head_dim, device=device).bfloat16()
    values = qkv[:, 3].clone()
    rotation = Rotation(table, positions, torch.bfloat16)
    queries = rope_and_cache(qkv, None, 1e-5, rotation, last_page * page_size + positions, k_cache, v_cache)
    assert torch.equal(v_cache[-1, :num_tokens, 0].float(), values.to(FP8).float())
    for batch_invariant in (False, True):
        layout = make_attention_layout([(0, num_tokens)], [[last_page]], page_size, device)
        found = paged_attention(queries, k_cache, v_cache, layout, 0.1, batch_invariant=batch_invariant)
        few = [cache[-1:].clone() for cache in (k_cache, v_cache)]
        layout = make_attention_layout([(0, num_tokens)], [[0]], page_size, device)
        expected = paged_attention(queries, few[0], few[1], layout, 0.1, batch_invariant=batch_invariant)
        assert bool(found.float().abs().sum() > 0)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("swiglu", [False, True])
def test_the_last_expert_of_many(swiglu: bool, device: torch.device, zeros: Bytes) -> None:
    n, k = 64, 128
    weight = zeros(BEYOND).view(FP8).view(-1, n, k)
    last = weight.shape[0] - 1
    weight[last] = torch.randn(n, k, device=device).to(FP8)
    scale = torch.ones(1, n, 1, device=device).expand(last + 1, n, 1).contiguous()
    is_quantized = has_fp8_units(device)
    x = torch.randn(1, k, device=device).to(FP8 if is_quantized else torch.bfloat16)
    x_scale = torch.ones(1, 1, device=device) if is_quantized else None
    experts = torch.tensor([last], device=device)

    def product(weight: torch.Tensor, scale: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        return expert_matmul(
            x,
            x_scale,
            weight,
            scale,
            None,
            MoeAlignment(expert, None, 1, 16, 1, 1),
            MoeConfig(16, 64, transposed=True, num_warps=4, num_stages=4),
            swiglu=swiglu,
            out_dtype=torch.float32,
        )

    found = product(weight, scale, experts)
    assert bool(found.abs().sum() > 0)
    assert torch.equal(found, product(weight[last:].clone(), scale[last:], torch.zeros_like(experts)))
