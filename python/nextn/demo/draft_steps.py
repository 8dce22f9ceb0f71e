"""Several draft steps at once for every position of a row, with exactly the keys and values that serving gives them.

A server drafts after position i like this (NextN is layer N, sharing slots and positions with the target):

- step 1 reads the embedding of t_{i+1} and the target's h_i, sits at position i and attends to the step-1 entries of
  all positions up to i, which were made from true hidden states;
- step j > 1 reads the embedding of t_{i+j} and the step before's normed output, sits at position i + j - 1, and
  attends to the step-1 entries up to i and to its own chain's entries of steps 2 to j.

Here all i run in parallel: the queries of step j meet the step-1 keys under a causal mask and, in extra score columns,
the keys of their own chain (as in the training-time test of EAGLE-3, Li et al., 2025).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, apply_rotary_pos_emb, repeat_kv

from nextn.demo.modeling import NextN

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Chain:
    """Keys and values, step by step: [num_rows, num_heads, len, head_dim] each."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def _attend(attention: Glm4MoeAttention, x: torch.Tensor, rotary: Rotary, chain: _Chain) -> torch.Tensor:
    """x: [num_rows, len, H], normed. Appends this step's keys and values to `chain`. Returns [num_rows, len, H]."""
    shape = (*x.shape[:-1], -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2)
    value = attention.v_proj(x).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    query = query.to(value.dtype)
    chain.keys.append(repeat_kv(key.to(value.dtype), attention.num_key_value_groups))
    chain.values.append(repeat_kv(value, attention.num_key_value_groups))

    row_len = x.shape[1]
    future = torch.ones(row_len, row_len, dtype=torch.bool).triu(1)
    scores = (query @ chain.keys[0].mT).masked_fill(future, float("-inf"))
    own = [(query * later).sum(-1, keepdim=True) for later in chain.keys[1:]]
    probs = (torch.cat([scores, *own], dim=-1).float() * attention.scaling).softmax(-1).to(value.dtype)
    out = probs[..., :row_len] @ chain.values[0]
    for column, later in enumerate(chain.values[1:], start=row_len):
        out = out + probs[..., column : column + 1] * later
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def draft_steps(
    nextn: NextN, rotary_emb: nn.Module, embedded: torch.Tensor, hidden: torch.Tensor, num_steps: int
) -> Iterator[torch.Tensor]:
    """Run `num_steps` draft steps for every position of every row.

    embedded: [num_rows, len, H], embeddings of the row's tokens
    hidden: [num_rows, len, H], the target's hidden states after model.norm
    Yields for each step j = 1, 2, ... the normed state [num_rows, len, H] whose entry i guesses token i + j + 1. The
    last j entries of a row have no token to read and mean nothing.
    """
    chain, layer = _Chain(), nextn.layer
    positions = torch.arange(embedded.shape[1]).unsqueeze(0)
    for step in range(1, num_steps + 1):
        x = nextn.combine(embedded.roll(-step, dims=1), hidden)
        rotary = rotary_emb(embedded, positions + step - 1)
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), rotary, chain)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden = nextn.norm(x)
        yield hidden
