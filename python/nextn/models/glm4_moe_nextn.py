"""The NextN (multi-token prediction) layer of GLM-4.x: a draft model of one block.

Given the target's normed hidden state h at position i - 1 and the token t at position i (DeepSeek-V3, section 2.2):

    x  = eh_proj(concat[enorm(embed(t_i)), hnorm(h_{i-1})])      the embedding's half first
    h' = shared_head.norm(block(x))                              predicts the token at i + 1
    logits = head(h')

To draft further, h' stands in for the target's hidden state: h'_i with the drafted token at i + 1, and so on.

The entry of (h_{i-1}, t_i) is stored at slot i and rotated to position i. The papers count it as i - 1; rotary
embeddings see only differences of positions, so the two are the same, and this way an entry depends on no token to the
right of its slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.config.model_config import ModelConfig
from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.linear import StoredWeight
from nextn.kernels.nextn_input import nextn_input, nextn_projection
from nextn.kernels.rope_and_cache import Rotation
from nextn.kernels.rotary import make_rotary_table
from nextn.layers.batch import ExtendBatch
from nextn.layers.embedding import Embedding, OutputHead
from nextn.layers.kv_cache import KVCache
from nextn.layers.linear import Linear
from nextn.layers.norm import RMSNorm
from nextn.layers.storage import Shard, Slot
from nextn.models.glm4_moe import Glm4MoeDecoderLayer, Glm4MoeForCausalLM
from nextn.quantization.scheme import QuantizationConfig


class Glm4MoeForCausalLMNextN(nn.Module):
    """Layer ``num_hidden_layers`` of the checkpoint, with its own or the target's embedding and head.

    quant_config: what the loader detected in the checkpoint the layer comes from; it is kept. The user's override has
        been applied before (``quantization.precedence``), so there is no second place that could drop it.
    target: lends its embedding and head where the checkpoint has none for this layer
    has_fp8_head: whether logits come from the head as FP8 codes, quantized once loaded. It is most of what a draft
        reads; what is drafted is verified by the target's.
    tp: as for the target. eh_proj is whole on every rank: cut, it would cost as much to put together as to compute.
    """

    def __init__(
        self,
        config: ModelConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        target: Glm4MoeForCausalLM,
        dtype: torch.dtype = torch.float32,
        has_own_head: bool = False,
        has_own_embedding: bool = False,
        has_fp8_head: bool = False,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        self.dtype = dtype
        hidden, eps = config.hidden_size, config.rms_norm_eps
        name = f"{prefix}model.layers.{config.num_hidden_layers}"
        self.enorm = RMSNorm(hidden, eps, f"{name}.enorm", dtype)
        self.hnorm = RMSNorm(hidden, eps, f"{name}.hnorm", dtype)
        self.eh_proj = Linear(2 * hidden, [Shard(f"{name}.eh_proj", hidden)], quant_config, dtype=dtype)
        self.block = Glm4MoeDecoderLayer(config, quant_config, name, config.num_hidden_layers, dtype, tp)
        self.norm = RMSNorm(hidden, eps, f"{name}.shared_head.norm", dtype)
        self.has_own_embedding = has_own_embedding
        self.has_own_head = has_own_head
        self.embed_tokens = (
            Embedding(config.vocab_size, hidden, f"{name}.embed_tokens", dtype)
            if has_own_embedding
            else target.embed_tokens
        )
        self.has_fp8_head = has_fp8_head
        if has_own_head:
            own = f"{name}.shared_head.head"
            self.head = OutputHead.untied(config.vocab_size, hidden, own, dtype, tp, becomes_fp8=has_fp8_head)
        else:
            self.head = target.lm_head.fp8_copy() if has_fp8_head else target.lm_head
        self._rotary = make_rotary_table(
            config.head_dim, config.rotary_dim, config.rope_theta, config.max_position_embeddings
        )

    def weight_slots(self) -> Iterator[Slot]:
        """A slot for every tensor of the layer."""
        for part in (self.enorm, self.hnorm, self.eh_proj, self.block, self.norm):
            yield from part.weight_slots()
        if self.has_own_embedding:
            yield from self.embed_tokens.weight_slots()
        if self.has_own_head:
            yield from self.head.weight_slots()

    def forward(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, batch: ExtendBatch, kv_cache: KVCache
    ) -> torch.Tensor:
        """Make and store the entries of the batch's positions.

        input_ids: [T] int64, the tokens at the positions
        hidden_states: [T, H], normed: the target's at the position before, or this layer's own output while drafting
        Returns h' of the tokens whose output is read, [R, H], normed: for ``compute_logits`` and for the next draft.
        """
        x, normed = self.block.normed(self._combine(input_ids, hidden_states))
        rotation = Rotation(self._rotary, batch.positions, self.dtype)
        return self.norm.forward(self.block.forward(x, normed, rotation, batch, kv_cache))

    def write_kv(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache: KVCache,
    ) -> None:
        """Make the entries of positions that nothing is drafted from.

        The layer is the only one of its kind, so keys and values depend on the position's own input alone: attention
        and experts are computed only where the output is read.

        input_ids, hidden_states: as for ``forward``; positions, slot_mapping: [T] int64
        """
        rotation = Rotation(self._rotary, positions, self.dtype)
        self.block.write_kv(self._combine(input_ids, hidden_states), rotation, slot_mapping, kv_cache)

    def _combine(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """eh_proj(concat[enorm(embed(t)), hnorm(h)]), [T, H]."""
        parts = (
            input_ids,
            self.embed_tokens.weight,
            hidden_states,
            self.enorm.weight,
            self.hnorm.weight,
            self.config.rms_norm_eps,
        )
        projection = self.eh_proj.packed
        if isinstance(projection, StoredWeight):
            return nextn_projection(
                *parts,
                projection.weight,
                projection.scale,
                projection.block,
                counters=projection.counters,
                batch_invariant=projection.batch_invariant,
            )
        return self.eh_proj.forward(nextn_input(*parts))

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, H], as ``forward`` returns it. Returns [R, vocab_size] float32."""
        return self.head.forward(hidden)
