"""GLM-4.x attention: grouped queries, biases on q, k, v, optional QK-norm per head, partial rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.model_config import ModelConfig
from nextn.kernels.paged_attention import paged_attention
from nextn.kernels.rms_norm import rms_norm
from nextn.kernels.rotary import RotaryTable, apply_rotary
from nextn.layers.batch import ExtendBatch
from nextn.layers.kv_cache import KVCache
from nextn.layers.linear import Linear
from nextn.layers.storage import Shard, Slot
from nextn.quantization.scheme import QuantizationConfig


class Rotation:
    """The rotations of a batch's positions, looked up once per forward. cos, sin: [T, 1, head_dim]."""

    def __init__(self, table: RotaryTable, positions: torch.Tensor, dtype: torch.dtype) -> None:
        self.cos = table.cos.index_select(0, positions).unsqueeze(1).to(dtype)
        self.sin = table.sin.index_select(0, positions).unsqueeze(1).to(dtype)
        self.partner = table.partner


class QKNorm(nn.Module):
    """RMSNorm of each query and key head, with one weight for all query heads and one for all key heads.

    weight: [2, head_dim], the queries' and the keys'; heads: [num_heads + num_kv_heads] int64, which of the two
    """

    def __init__(self, config: ModelConfig, prefix: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.prefix = prefix
        self.eps = config.rms_norm_eps
        self.weight = torch.empty(2, config.head_dim, dtype=dtype)
        self.heads = torch.tensor([0] * config.num_attention_heads + [1] * config.num_key_value_heads)

    def weight_slots(self) -> Iterator[Slot]:
        yield f"{self.prefix}.q_norm.weight", self.weight[0]
        yield f"{self.prefix}.k_norm.weight", self.weight[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, num_heads + num_kv_heads, head_dim], before rotation. Returns the same shape."""
        return rms_norm(x, self.weight.index_select(0, self.heads), self.eps)


class Attention(nn.Module):
    """One layer's attention over the KV pool's layer ``layer``."""

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        layer: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = Linear(
            config.hidden_size,
            [Shard(f"{prefix}.q_proj", q_rows), Shard(f"{prefix}.k_proj", kv_rows), Shard(f"{prefix}.v_proj", kv_rows)],
            quant_config,
            bias=config.attention_bias,
            dtype=dtype,
        )
        self.o_proj = Linear(q_rows, [Shard(f"{prefix}.o_proj", config.hidden_size)], quant_config, dtype=dtype)
        self.qk_norm = QKNorm(config, prefix, dtype) if config.use_qk_norm else None

    def weight_slots(self) -> Iterator[Slot]:
        for part in (self.qkv_proj, self.o_proj, self.qk_norm):
            if part is not None:
                yield from part.weight_slots()

    def forward(self, x: torch.Tensor, rotation: Rotation, batch: ExtendBatch, kv_cache: KVCache) -> torch.Tensor:
        """x: [T, H], normed. Writes the tokens' KV, attends over all of it. Returns [T, H]."""
        heads = self.qkv_proj.forward(x).view(x.shape[0], -1, self.head_dim)
        rotated = heads[:, : self.num_heads + self.num_kv_heads]
        if self.qk_norm is not None:
            rotated = self.qk_norm.forward(rotated)
        rotated = apply_rotary(rotated, rotation.cos, rotation.sin, rotation.partner)
        k_cache, v_cache = kv_cache.k[self.layer], kv_cache.v[self.layer]
        k_cache.view(-1, self.num_kv_heads, self.head_dim).index_copy_(
            0, batch.slot_mapping, rotated[:, self.num_heads :]
        )
        v_cache.view(-1, self.num_kv_heads, self.head_dim).index_copy_(
            0, batch.slot_mapping, heads[:, self.num_heads + self.num_kv_heads :]
        )
        attended = paged_attention(rotated[:, : self.num_heads], k_cache, v_cache, batch.groups, self.scale)
        return self.o_proj.forward(attended.reshape(x.shape[0], -1))
