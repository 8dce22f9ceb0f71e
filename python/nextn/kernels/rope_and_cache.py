"""QK-norm, partial rotary embedding and the write to the paged KV, between the QKV product and attention.

Floor: one read and write of q, k and v; limited by launches at small batches.
"""

from __future__ import annotations

from functools import cached_property

import torch

from nextn.kernels import native
from nextn.kernels.rms_norm import rms_norm
from nextn.kernels.rotary import RotaryTable, apply_rotary


class Rotation:
    """The rotations of a batch's positions, looked up at most once per forward.

    positions: [T] int64; cos, sin: [T, 1, head_dim]
    """

    def __init__(self, table: RotaryTable, positions: torch.Tensor, dtype: torch.dtype) -> None:
        self.table = table
        self.positions = positions
        self.dtype = dtype

    @cached_property
    def cos(self) -> torch.Tensor:
        return self.table.cos.index_select(0, self.positions).unsqueeze(1).to(self.dtype)

    @cached_property
    def sin(self) -> torch.Tensor:
        return self.table.sin.index_select(0, self.positions).unsqueeze(1).to(self.dtype)


def rope_and_cache(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotation: Rotation,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate queries and keys, and store keys and values.

    qkv: [T, num_heads + 2 · num_kv_heads, head_dim]; may be overwritten
    qk_norm: [2, head_dim], RMSNorm weights of query and key heads, or None
    slot_mapping: [T] int64, page · page_size + offset
    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim]
    Returns the queries [T, num_heads, head_dim], possibly a view of qkv.
    """
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = k_cache.shape[2]
    num_heads = num_all_heads - 2 * num_kv_heads
    if (
        native.cpu is not None
        and native.suits(qkv)
        and native.suits(k_cache)
        and native.suits(v_cache)
        and head_dim % 16 == 0
    ):
        norm = 0 if qk_norm is None else qk_norm.data_ptr()
        native.cpu.rope_and_cache(
            qkv.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            rotation.table.rotary_dim // 2,
            norm,
            norm and norm + head_dim * qkv.itemsize,
            eps,
            rotation.table.cos.data_ptr(),
            rotation.table.sin.data_ptr(),
            rotation.positions.data_ptr(),
            slot_mapping.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
        )
        return qkv[:, :num_heads]
    rotated = qkv[:, : num_heads + num_kv_heads]
    if qk_norm is not None:
        weights = qk_norm.repeat_interleave(torch.tensor([num_heads, num_kv_heads], device=qkv.device), 0)
        rotated = rms_norm(rotated, weights, eps)
    rotated = apply_rotary(rotated, rotation.cos, rotation.sin, rotation.table.partner)
    k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, rotated[:, num_heads:])
    v_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, qkv[:, num_heads + num_kv_heads :])
    return rotated[:, :num_heads]
