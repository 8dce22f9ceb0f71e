"""The bytes that a step of a GLM-4.x model with FP8 weights has to read."""

from __future__ import annotations

from nextn.config.model_config import ModelConfig

FP8, BF16, FLOAT32 = 1, 2, 4


def expert_bytes(config: ModelConfig) -> int:
    """One expert's three matrices, in FP8."""
    return 3 * config.moe_intermediate_size * config.hidden_size


def attention_bytes(config: ModelConfig) -> int:
    """One layer's four projections, in FP8."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * queries + 2 * keys)


def head_bytes(config: ModelConfig, element_size: int = BF16) -> int:
    """The output head."""
    return config.vocab_size * config.hidden_size * element_size


def touched_experts(config: ModelConfig, num_tokens: int) -> float:
    """Different routed experts that tokens take which choose at random."""
    num, chosen = config.n_routed_experts, config.num_experts_per_tok
    return num * (1 - (1 - chosen / num) ** num_tokens)


def moe_layer_bytes(config: ModelConfig, touched: float) -> float:
    """A layer of experts, with its attention. touched: routed experts that are read."""
    gate = config.n_routed_experts * config.hidden_size * FLOAT32
    return attention_bytes(config) + gate + (touched + config.n_shared_experts) * expert_bytes(config)


def step_bytes(config: ModelConfig, num_tokens: int, touched: float | None = None) -> float:
    """A forward of the target over num_tokens tokens of a batch; KV is left out.

    touched: routed experts per layer that are read; None takes those of random choice
    """
    touched = touched_experts(config, num_tokens) if touched is None else touched
    num_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    dense = attention_bytes(config) + 3 * config.intermediate_size * config.hidden_size
    layers = (config.num_hidden_layers - num_dense) * moe_layer_bytes(config, touched)
    return num_dense * dense + layers + head_bytes(config)


def draft_bytes(config: ModelConfig, num_tokens: int, head_size: int = FP8) -> float:
    """One draft for each of num_tokens sequences. head_size: of an element of the head that drafts read"""
    layer = moe_layer_bytes(config, touched_experts(config, num_tokens))
    return layer + head_bytes(config, head_size) + 2 * config.hidden_size**2 * BF16


def kv_bytes(config: ModelConfig, num_tokens: int, element_size: int) -> int:
    """Keys and values of one layer."""
    return 2 * num_tokens * config.num_key_value_heads * config.head_dim * element_size


def best_ratio(config: ModelConfig, batch: int, num_drafts: int, accept_length: float, head_size: int = FP8) -> float:
    """What drafts can gain at best in throughput, by bytes alone and with random choice of experts."""
    cycle = step_bytes(config, batch * (num_drafts + 1)) + num_drafts * draft_bytes(config, batch, head_size)
    return accept_length * step_bytes(config, batch) / cycle
