"""GLM-4.x attention: grouped queries, biases on q, k, v, optional QK-norm per head, partial rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.model_config import ModelConfig
from nextn.kernels.linear import InputFormat, Rows, linear, rows_from
from nextn.kernels.paged_attention import paged_attention
from nextn.kernels.rope_and_cache import Rotation, rope_and_cache
from nextn.layers.batch import ExtendBatch
from nextn.layers.kv_cache import KVCache
from nextn.layers.linear import Linear
from nextn.layers.storage import Shard, Slot
from nextn.quantization.scheme import QuantizationConfig


class Attention(nn.Module):
    """One layer's attention over the KV pool's layer ``layer``.

    qk_norm: [2, head_dim], the RMSNorm weights of all query heads and of all key heads, or None
    packed_kv: the rows of k and v in qkv_proj, for tokens whose queries nobody reads
    """

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
        self.prefix = prefix
        self.eps = config.rms_norm_eps
        self.qk_norm = torch.empty(2, config.head_dim, dtype=dtype) if config.use_qk_norm else None
        self.packed_kv = rows_from(self.qkv_proj.packed, q_rows)
        self.batch_invariant = False

    def weight_slots(self) -> Iterator[Slot]:
        yield from self.qkv_proj.weight_slots()
        yield from self.o_proj.weight_slots()
        if self.qk_norm is not None:
            yield f"{self.prefix}.q_norm.weight", self.qk_norm[0]
            yield f"{self.prefix}.k_norm.weight", self.qk_norm[1]

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded, and qkv_proj prepared."""
        self.batch_invariant = batch_invariant
        self.packed_kv = rows_from(self.qkv_proj.packed, self.num_heads * self.head_dim)

    def forward(
        self,
        x: torch.Tensor | Rows,
        rotation: Rotation,
        batch: ExtendBatch,
        kv_cache: KVCache,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the tokens' KV, attend over all of it.

        x: [T, H], normed; residual: [R, H], added, for the tokens whose output is read
        Returns [R, H].
        """
        q, k_cache, v_cache = self._rotate_and_write(self.qkv_proj.forward(x), rotation, batch.slot_mapping, kv_cache)
        if batch.output_rows is not None:
            q = q.index_select(0, batch.output_rows)
        attended = paged_attention(q, k_cache, v_cache, batch.layout, self.scale, batch_invariant=self.batch_invariant)
        return self.o_proj.forward(attended.reshape(q.shape[0], -1), residual)

    @property
    def input_format(self) -> InputFormat | None:
        """How its input should come; None for wide."""
        return self.qkv_proj.input_format

    def write_kv(
        self, x: torch.Tensor | Rows, rotation: Rotation, slot_mapping: torch.Tensor, kv_cache: KVCache
    ) -> None:
        """Only write the tokens' KV. x: [T, H], normed; slot_mapping: [T] int64."""
        self._rotate_and_write(linear(x, self.packed_kv), rotation, slot_mapping, kv_cache)

    def _rotate_and_write(
        self, projected: torch.Tensor, rotation: Rotation, slot_mapping: torch.Tensor, kv_cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """projected: [T, rows of q (or none), k and v]

        Returns the queries [T, num_heads, head_dim], and the layer's caches with keys and values written.
        """
        qkv = projected.view(projected.shape[0], -1, self.head_dim)
        k_cache, v_cache = kv_cache.k[self.layer], kv_cache.v[self.layer]
        return (
            rope_and_cache(qkv, self.qk_norm, self.eps, rotation, slot_mapping, k_cache, v_cache),
            k_cache,
            v_cache,
        )
