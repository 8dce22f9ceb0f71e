"""GLM-4.5/4.6/4.7 Mixture-of-Experts language models (GLM-4.5 technical report, Zhipu AI, 2025)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.cuts import check_cut
from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.linear import Rows
from nextn.kernels.rope_and_cache import Rotation
from nextn.kernels.rotary import make_rotary_table
from nextn.layers.attention import Attention
from nextn.layers.batch import ExtendBatch
from nextn.layers.embedding import Embedding, OutputHead
from nextn.layers.kv_cache import KVCache
from nextn.layers.mlp import MLP
from nextn.layers.moe import MoE
from nextn.layers.norm import RMSNorm, Stream
from nextn.layers.storage import Slot
from nextn.quantization.scheme import QuantizationConfig


class Glm4MoeDecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

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
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps, f"{prefix}.input_layernorm", dtype)
        self.self_attn = Attention(config, quant_config, f"{prefix}.self_attn", layer, dtype, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps, f"{prefix}.post_attention_layernorm", dtype)
        self.mlp: MLP | MoE
        if config.is_dense(layer):
            self.mlp = MLP(config.hidden_size, config.intermediate_size, quant_config, f"{prefix}.mlp", dtype, tp)
        else:
            self.mlp = MoE(config, quant_config, f"{prefix}.mlp", dtype, tp)

    def weight_slots(self) -> Iterator[Slot]:
        for part in (self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp):
            yield from part.weight_slots()

    def normed(self, x: Stream) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """The residual stream [T, H], summed, and its norm: what ``forward`` takes.

        Apart from it, so that the caller lets go of the experts' terms, which are large, before a layer computes.
        """
        return self.input_layernorm.forward_for(x, self.self_attn.input_format)

    def forward(
        self,
        x: torch.Tensor,
        normed: torch.Tensor | Rows,
        rotation: Rotation,
        batch: ExtendBatch,
        kv_cache: KVCache,
    ) -> Stream:
        """x: [T, H], the residual stream. Returns [R, H], for the tokens whose output is read; mostly all."""
        attention, mlp = self.self_attn, self.mlp
        if batch.output_rows is not None:
            x = x.index_select(0, batch.output_rows)
        x, normed = self.post_attention_layernorm.forward_for(
            attention.forward(normed, rotation, batch, kv_cache, residual=x), mlp.input_format
        )
        return mlp.forward(normed, residual=x)

    def write_kv(self, x: torch.Tensor, rotation: Rotation, slot_mapping: torch.Tensor, kv_cache: KVCache) -> None:
        """Only write the tokens' KV, where nothing reads the output. x: [T, H]; slot_mapping: [T] int64."""
        _, normed = self.normed(x)
        self.self_attn.write_kv(normed, rotation, slot_mapping, kv_cache)


class Glm4MoeForCausalLM(nn.Module):
    """Embedding, num_hidden_layers blocks, a final norm, and an output head.

    prefix: stands before every tensor name; published checkpoints have none
    dtype: of everything that is not quantized, and of the residual stream
    tp: the ranks that hold the model together; each holds a part of the heads, of every MLP and expert, and of the
        output head. Hidden states are whole and the same everywhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        dtype: torch.dtype = torch.float32,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        check_cut(config, tp.size)
        self.config = config
        self.quant_config = quant_config
        self.dtype = dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, f"{prefix}model.embed_tokens", dtype)
        self.layers = nn.ModuleList(
            Glm4MoeDecoderLayer(config, quant_config, f"{prefix}model.layers.{i}", i, dtype, tp)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, f"{prefix}model.norm", dtype)
        self.lm_head = (
            OutputHead.tied(self.embed_tokens, tp)
            if config.tie_word_embeddings
            else OutputHead.untied(config.vocab_size, config.hidden_size, f"{prefix}lm_head", dtype, tp)
        )
        self._rotary = make_rotary_table(
            config.head_dim, config.rotary_dim, config.rope_theta, config.max_position_embeddings
        )

    def weight_slots(self) -> Iterator[Slot]:
        """A slot for every tensor the model consumes."""
        yield from self.embed_tokens.weight_slots()
        for layer in self.layers:
            assert isinstance(layer, Glm4MoeDecoderLayer)
            yield from layer.weight_slots()
        yield from self.norm.weight_slots()
        yield from self.lm_head.weight_slots()

    def forward(self, input_ids: torch.Tensor, batch: ExtendBatch, kv_cache: KVCache) -> torch.Tensor:
        """Extend every sequence of the batch by its new tokens, and write their KV.

        input_ids: [T] int64
        Returns hidden states after the final norm, [T, H] in the model's dtype.
        """
        x: Stream = self.embed_tokens.forward(input_ids)
        rotation = Rotation(self._rotary, batch.positions, self.dtype)
        for layer in self.layers:
            assert isinstance(layer, Glm4MoeDecoderLayer)
            x, normed = layer.normed(x)
            x = layer.forward(x, normed, rotation, batch, kv_cache)
        return self.norm.forward(x)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, H], as ``forward`` returns it. Returns [R, vocab_size] float32."""
        return self.lm_head.forward(hidden)
