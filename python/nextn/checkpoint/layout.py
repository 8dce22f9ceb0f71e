"""Every tensor that a model takes from a checkpoint: its name, shape and part, from the configs alone.

The models of ``nextn.models`` own storage for exactly these tensors; this page says the same without torch, so that a
checkpoint can be judged before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nextn.config.model_config import ModelConfig
from nextn.quantization.scheme import UNQUANTIZED, LinearScheme, QuantizationConfig

Role = Literal["weight", "bias", "scale", "input_scale", "norm", "plain"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALES: tuple[Role, ...] = ("scale", "input_scale")


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """role: "weight" and "bias" of linears, their scales, norms, and "plain": router, embedding, head."""

    name: str
    shape: tuple[int, ...]
    role: Role
    kind: str
    scheme: LinearScheme


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A linear that may be fused of several checkpoint modules.

    kind: as in the load report; shards: (checkpoint module name, output rows); num_fused: shards of one matrix, where
        several matrices are decided together, as all experts of a layer are
    """

    kind: str
    shards: tuple[tuple[str, int], ...]
    num_fused: int
    in_features: int
    scheme: LinearScheme
    has_bias: bool = False

    @property
    def num_matrices(self) -> int:
        return len(self.shards) // self.num_fused

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Of one matrix, all its shards' scales together: rows × columns."""
        if not self.scheme.is_quantized:
            return None
        return sum(_scale_rows(rows, self.scheme) for _, rows in self.shards[: self.num_fused]), self._scale_columns

    @property
    def _scale_columns(self) -> int:
        return -(-self.in_features // self.scheme.block[1]) if self.scheme.block else 1

    def tensors(self) -> Iterator[ExpectedTensor]:
        scheme = self.scheme
        for name, rows in self.shards:
            yield ExpectedTensor(f"{name}.weight", (rows, self.in_features), "weight", self.kind, scheme)
            if self.has_bias:
                yield ExpectedTensor(f"{name}.bias", (rows,), "bias", self.kind, scheme)
            if not scheme.is_quantized:
                continue
            shape = () if scheme.kind == "fp8_tensor" else (_scale_rows(rows, scheme), self._scale_columns)
            yield ExpectedTensor(f"{name}.{scheme.scale_suffix}", shape, "scale", self.kind, scheme)
            if scheme.activation == "static_tensor":
                yield ExpectedTensor(f"{name}.input_scale", (), "input_scale", self.kind, scheme)


def _scale_rows(rows: int, scheme: LinearScheme) -> int:
    if scheme.kind == "fp8_channel":
        return rows
    return -(-rows // scheme.block[0]) if scheme.block else 1


@dataclass(frozen=True)
class Layout:
    """linears: whose storage a quantization config decides; others: everything else."""

    linears: tuple[LinearModule, ...]
    others: tuple[ExpectedTensor, ...]

    def tensors(self) -> Iterator[ExpectedTensor]:
        for linear in self.linears:
            yield from linear.tensors()
        yield from self.others


def nextn_prefix(config: ModelConfig) -> str:
    """What the names of the NextN layer's tensors begin with."""
    return f"model.layers.{config.num_hidden_layers}."


def target_layout(config: ModelConfig, quantization: QuantizationConfig) -> Layout:
    """Layers 0 … num_hidden_layers - 1, the embedding, the last norm and the head.

    Raises QuantizationError where config and tensors disagree about a linear.
    """
    make = _Maker(config, quantization)
    make.plain(EMBEDDING, (config.vocab_size, config.hidden_size), "embed_tokens")
    for layer in range(config.num_hidden_layers):
        make.block(layer)
    make.norm("model.norm")
    if not config.tie_word_embeddings:
        make.plain(HEAD, (config.vocab_size, config.hidden_size), "lm_head")
    return make.layout()


def nextn_layout(
    config: ModelConfig, quantization: QuantizationConfig, *, has_own_head: bool, has_own_embedding: bool
) -> Layout:
    """The NextN layer, which is layer ``num_hidden_layers``.

    Raises QuantizationError where config and tensors disagree about a linear.
    """
    make = _Maker(config, quantization)
    name = f"model.layers.{config.num_hidden_layers}"
    for part in ("enorm", "hnorm"):
        make.norm(f"{name}.{part}")
    make.linear("eh_proj", [(f"{name}.eh_proj", config.hidden_size)], 2 * config.hidden_size)
    make.block(config.num_hidden_layers)
    make.norm(f"{name}.shared_head.norm")
    if has_own_embedding:
        make.plain(f"{name}.embed_tokens.weight", (config.vocab_size, config.hidden_size), "embed_tokens")
    if has_own_head:
        make.plain(f"{name}.shared_head.head.weight", (config.vocab_size, config.hidden_size), "lm_head")
    return make.layout()


class _Maker:
    """Collects the modules in the model's order."""

    def __init__(self, config: ModelConfig, quantization: QuantizationConfig) -> None:
        self._config = config
        self._quantization = quantization
        self._linears: list[LinearModule] = []
        self._others: list[ExpectedTensor] = []

    def layout(self) -> Layout:
        return Layout(tuple(self._linears), tuple(self._others))

    def linear(
        self, kind: str, shards: list[tuple[str, int]], in_features: int, *, num_fused: int = 0, has_bias: bool = False
    ) -> None:
        scheme = self._quantization.scheme_for([name for name, _ in shards])
        self._linears.append(LinearModule(kind, tuple(shards), num_fused or len(shards), in_features, scheme, has_bias))

    def plain(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        self._others.append(ExpectedTensor(name, shape, "plain", kind, UNQUANTIZED))

    def norm(self, name: str, size: int | None = None) -> None:
        shape = (self._config.hidden_size if size is None else size,)
        self._others.append(ExpectedTensor(f"{name}.weight", shape, "norm", "norms", UNQUANTIZED))

    def block(self, layer: int) -> None:
        """A decoder layer (``nextn.models.glm4_moe.Glm4MoeDecoderLayer``)."""
        config, name = self._config, f"model.layers.{layer}"
        self.norm(f"{name}.input_layernorm")
        q_rows, kv_rows = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        attention = f"{name}.self_attn"
        self.linear(
            "qkv_proj",
            [(f"{attention}.{part}_proj", rows) for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))],
            config.hidden_size,
            has_bias=config.attention_bias,
        )
        self.linear("o_proj", [(f"{attention}.o_proj", config.hidden_size)], q_rows)
        if config.use_qk_norm:
            self.norm(f"{attention}.q_norm", config.head_dim)
            self.norm(f"{attention}.k_norm", config.head_dim)
        self.norm(f"{name}.post_attention_layernorm")
        if config.is_dense(layer):
            self.mlp("mlp", f"{name}.mlp", config.intermediate_size)
        else:
            self.moe(f"{name}.mlp")

    def mlp(self, kind: str, name: str, inner: int) -> None:
        hidden = self._config.hidden_size
        self.linear(f"{kind}.gate_up_proj", [(f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)], hidden)
        self.linear(f"{kind}.down_proj", [(f"{name}.down_proj", hidden)], inner)

    def moe(self, name: str) -> None:
        config = self._config
        num_experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.plain(f"{name}.gate.weight", (num_experts, hidden), "router gate")
        self.plain(f"{name}.gate.e_score_correction_bias", (num_experts,), "router bias")
        experts = [f"{name}.experts.{e}" for e in range(num_experts)]
        w13 = [(f"{expert}.{part}_proj", inner) for expert in experts for part in ("gate", "up")]
        self.linear("experts.w13", w13, hidden, num_fused=2)
        self.linear("experts.w2", [(f"{expert}.down_proj", hidden) for expert in experts], inner, num_fused=1)
        if config.n_shared_experts:
            self.mlp("shared_experts", f"{name}.shared_experts", inner * config.n_shared_experts)
