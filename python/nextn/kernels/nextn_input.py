"""The input of the NextN layer's projection: concat[enorm(embed(t)), hnorm(h)].

Floor: one read of T embedding rows and hidden states, one write of both; limited by launches at small batches.
"""

from __future__ import annotations

import torch

from nextn.kernels import native
from nextn.kernels.rms_norm import rms_norm


def nextn_input(
    input_ids: torch.Tensor,
    embedding: torch.Tensor,
    hidden_states: torch.Tensor,
    enorm: torch.Tensor,
    hnorm: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Normed embeddings beside normed hidden states, the embedding's half first.

    input_ids: [T] int64, each in [0, V); embedding: [V, H]; hidden_states: [T, H]; enorm, hnorm: [H]
    Returns [T, 2H] in hidden_states' dtype.
    """
    if native.cpu is not None and native.suits(hidden_states) and native.suits(embedding):
        num_tokens, size = hidden_states.shape
        out = hidden_states.new_empty(num_tokens, 2 * size)
        native.cpu.nextn_input(
            input_ids.data_ptr(),
            embedding.data_ptr(),
            hidden_states.data_ptr(),
            enorm.data_ptr(),
            hnorm.data_ptr(),
            num_tokens,
            size,
            eps,
            out.data_ptr(),
        )
        return out
    embedded = embedding.index_select(0, input_ids)
    return torch.cat([rms_norm(embedded, enorm, eps), rms_norm(hidden_states, hnorm, eps)], -1)
