"""The KV pool's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVCache:
    """Paged keys and values of all layers; the NextN draft is layer ``num_hidden_layers``, where it is served.

    k, v: [num_layers, num_pages, page_size, num_kv_heads, head_dim]
    """

    k: torch.Tensor
    v: torch.Tensor

    @property
    def page_size(self) -> int:
        return self.k.shape[2]
