"""GLM-4.x attention: grouped queries, biases on q, k, v, optional QK-norm per head, partial rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from nextn.config.cuts import heads_of
from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.errors import ConfigError
from nextn.kernels.linear import InputFormat, Rows, linear, rows_from
from nextn.kernels.paged_attention import AttentionLayout, paged_attention, paged_attention_quantized
from nextn.kernels.rope_and_cache import Rotation, rope_and_cache
from nextn.layers.batch import ExtendBatch
from nextn.layers.kv_cache import KVCache
from nextn.layers.linear import Linear
from nextn.layers.norm import Stream, sum_over_ranks
from nextn.layers.storage import Shard, Slot
from nextn.quantization.scheme import QuantizationConfig

MIN_GROUP = 32
"""The fewest columns with a scale of their own that products take."""


class Attention(nn.Module):
    """One layer's attention over the KV pool's layer ``layer``: the rank's heads of it.

    qk_norm: [2, head_dim], the RMSNorm weights of all query heads and of all key heads, or None
    input_format: how its input should come; None for wide
    quantizes_heads: whether each head's result goes to o_proj in FP8 with a scale of its own: finer than per token, and
        not a pass of its own
    packed_kv: the rows of k and v in qkv_proj, for tokens whose queries nobody reads
    """

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        layer: int,
        dtype: torch.dtype,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.layer = layer
        self.head_dim = config.head_dim
        heads, kv_heads = heads_of(config, tp.size, tp.rank)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)
        self.scale = config.head_dim**-0.5
        q_rows, kv_rows = _rows_of(heads, config.head_dim), _rows_of(kv_heads, config.head_dim)
        self.qkv_proj = Linear(
            config.hidden_size,
            [Shard.of_rows(f"{prefix}.{part}_proj", kv_rows if part in "kv" else q_rows) for part in "qkv"],
            quant_config,
            bias=config.attention_bias,
            dtype=dtype,
        )
        self.o_proj = Linear(
            len(q_rows), [Shard.of_columns(f"{prefix}.o_proj", config.hidden_size, q_rows)], quant_config, dtype=dtype
        )
        if tp.size > 1:
            self._check_blocks(prefix)
        self.prefix = prefix
        self.eps = config.rms_norm_eps
        self.qk_norm = torch.empty(2, config.head_dim, dtype=dtype) if config.use_qk_norm else None
        self.packed_kv = rows_from(self.qkv_proj.packed, len(q_rows))
        self.batch_invariant = False
        self.input_format: InputFormat | None = None
        self.quantizes_heads = False

    def weight_slots(self) -> Iterator[Slot]:
        yield from self.qkv_proj.weight_slots()
        yield from self.o_proj.weight_slots()
        if self.qk_norm is not None:
            yield Slot(f"{self.prefix}.q_norm.weight", self.qk_norm[0])
            yield Slot(f"{self.prefix}.k_norm.weight", self.qk_norm[1])

    def _check_blocks(self, prefix: str) -> None:
        """Raises ConfigError if the cut between two ranks' heads falls inside a block of quantized weights."""
        for part, num_heads, axis in (("q", self.num_heads, 0), ("k", self.num_kv_heads, 0), ("o", self.num_heads, 1)):
            block = (self.o_proj if part == "o" else self.qkv_proj).scheme.block
            if block is not None and num_heads * self.head_dim % block[axis]:
                raise ConfigError(
                    f"--tp-size {self.tp.size}: {prefix}.{part}_proj: a rank's {num_heads} heads of {self.head_dim} "
                    f"are no multiple of its FP8 blocks of {block[axis]}; choose a smaller --tp-size"
                )

    def prepare(self, *, batch_invariant: bool) -> None:
        """Once loaded, and qkv_proj prepared."""
        self.batch_invariant = batch_invariant
        self.input_format = self.qkv_proj.input_format
        self.packed_kv = rows_from(self.qkv_proj.packed, self.num_heads * self.head_dim)
        wanted = self.o_proj.input_format
        is_group = self.head_dim >= MIN_GROUP and self.head_dim & (self.head_dim - 1) == 0
        self.quantizes_heads = wanted is not None and is_group and wanted.group_size in (None, self.head_dim)

    def forward(
        self,
        x: torch.Tensor | Rows,
        rotation: Rotation,
        batch: ExtendBatch,
        kv_cache: KVCache,
        residual: torch.Tensor | None = None,
    ) -> Stream:
        """Write the tokens' KV, attend over all of it.

        x: [T, H], normed; residual: [R, H], added, for the tokens whose output is read
        Returns [R, H], summed over all ranks' heads, or with the residual yet to be added.
        """
        q, k_cache, v_cache = self._rotate_and_write(self.qkv_proj.forward(x), rotation, batch.slot_mapping, kv_cache)
        if batch.output_rows is not None:
            q = q.index_select(0, batch.output_rows)
        attended = self._attend(q, k_cache, v_cache, batch.layout)
        return sum_over_ranks(self.tp, partial(self.o_proj.forward, attended), residual)

    def _attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layout: AttentionLayout
    ) -> torch.Tensor | Rows:
        """q: [R, num_heads, head_dim]. Returns [R, num_heads · head_dim], as o_proj wants it."""
        attend = partial(
            paged_attention_quantized if self.quantizes_heads else paged_attention,
            next_weight=self.o_proj.packed.weight,
            batch_invariant=self.batch_invariant,
        )
        attended = attend(q, k_cache, v_cache, layout, self.scale)
        if isinstance(attended, torch.Tensor):
            return attended.reshape(q.shape[0], -1)
        return Rows(*attended, None, q.dtype)

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


def _rows_of(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
