"""QK-norm, partial rotary embedding and the write to the paged KV, between the QKV product and attention.

Floor: one read and write of q, k and v; limited by launches at small batches.
"""

from __future__ import annotations

from functools import cached_property

import torch

from nextn.kernels import gpu, native
from nextn.kernels.fp8_quantize import FP8, FP8_MAX
from nextn.kernels.gpu import jit, tl, wait_for_predecessor
from nextn.kernels.rms_norm import rms_norm
from nextn.kernels.rotary import RotaryTable, apply_rotary

HEADS_PER_PROGRAM = 16


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

    qkv: [T, num_heads + 2 · num_kv_heads, head_dim]; may be overwritten; there may be no query heads
    qk_norm: [2, head_dim], RMSNorm weights of query and key heads, or None
    slot_mapping: [T] int64, page · page_size + offset, or -1 where nothing is to be stored
    k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], contiguous; of float8_e4m3fn, values beyond ±448
        saturate
    Returns the queries [T, num_heads, head_dim] in qkv's dtype, possibly a view of qkv.
    """
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = k_cache.shape[2]
    num_heads = num_all_heads - 2 * num_kv_heads
    if gpu.suits(qkv, k_cache, v_cache) and head_dim == gpu.next_power_of_2(head_dim):
        return _launch_rope(qkv, qk_norm, eps, rotation, slot_mapping, k_cache, v_cache)
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
    _store(rotated[:, num_heads:], slot_mapping, k_cache)
    _store(qkv[:, num_heads + num_kv_heads :], slot_mapping, v_cache)
    return rotated[:, :num_heads]


def _store(rows: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """rows: [T, num_kv_heads, head_dim]"""
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        rows, slot_mapping = rows[kept], slot_mapping[kept]
    if cache.dtype == FP8:
        rows = rows.float().clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, rows.to(cache.dtype))


def _launch_rope(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotation: Rotation,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    if qkv.stride()[1:] != (qkv.shape[2], 1):
        qkv = qkv.contiguous()
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = k_cache.shape[2]
    queries = torch.empty(num_tokens, num_all_heads - 2 * num_kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        is_fp8 = k_cache.dtype == FP8
        gpu.launch(
            _rope_and_cache,
            (num_tokens, gpu.cdiv(num_all_heads, HEADS_PER_PROGRAM)),
            qkv,
            qkv if qk_norm is None else qk_norm,
            eps,
            rotation.table.cos,
            rotation.table.sin,
            rotation.positions,
            slot_mapping,
            k_cache.view(torch.uint8) if is_fp8 else k_cache,
            v_cache.view(torch.uint8) if is_fp8 else v_cache,
            queries,
            qkv.stride(0),
            NUM_HEADS=queries.shape[1],
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=rotation.table.rotary_dim,
            HAS_NORM=qk_norm is not None,
            IS_FP8=is_fp8,
            BLOCK=HEADS_PER_PROGRAM,
        )
    return queries


@jit
def fp8_codes(x):  # type: ignore[no-untyped-def]
    """float8_e4m3fn codes, as uint8, of float32 values: the nearest, ties to even, ±448 for values beyond.

    In integers, because not every card converts. Normal codes are a float's upper bits, rounded, with the exponent's
    bias moved from 127 to 7. Beside 2¹⁴ a float's last bit is 2⁻⁹, the step of subnormal codes.
    """
    size = tl.minimum(tl.abs(x), 448.0, propagate_nan=tl.PropagateNan.ALL)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(size == size, code, 0x7F)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@jit(varying=("positions", "slot_mapping"))
def _rope_and_cache(  # type: ignore[no-untyped-def]
    qkv,
    qk_norm,
    eps,
    cos,
    sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    queries,
    stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token, block of heads). A dimension's partner is read beside it; both are normed alike."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    half: tl.constexpr = ROTARY_DIM // 2
    partners = tl.where(dims < half, dims + half, tl.where(dims < ROTARY_DIM, dims - half, dims))
    is_turned = heads < NUM_HEADS + NUM_KV_HEADS
    is_head = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    # Positions and slots are older than the product that qkv comes from. They are read past the L1 cache, which may be
    # emptied for a kernel no earlier than when it waits for its predecessor.
    position = tl.load(positions + token, cache_modifier=".cg")
    slot = tl.load(slot_mapping + token, cache_modifier=".cg")
    cosines = tl.load(cos + position * HEAD_DIM + dims)
    sines = tl.load(sin + position * HEAD_DIM + dims)
    wait_for_predecessor(EARLY)
    first = qkv + token * stride + heads[:, None] * HEAD_DIM
    values = tl.load(first + dims[None, :], mask=is_head[:, None], other=0.0)
    others = tl.load(first + partners[None, :], mask=is_turned[:, None], other=0.0)

    turned, beside = values.to(tl.float32), others.to(tl.float32)
    if HAS_NORM:
        factor = (1.0 / tl.sqrt_rn(tl.sum(turned * turned, 1) / HEAD_DIM + eps))[:, None]
        weights = qk_norm + (heads >= NUM_HEADS).to(tl.int32)[:, None] * HEAD_DIM
        turned = (turned * factor).to(values.dtype).to(tl.float32) * tl.load(weights + dims[None, :]).to(tl.float32)
        beside = (beside * factor).to(values.dtype).to(tl.float32) * tl.load(weights + partners[None, :]).to(tl.float32)
        turned, beside = turned.to(values.dtype).to(tl.float32), beside.to(values.dtype).to(tl.float32)
    turned = turned * cosines[None, :] + beside * sines[None, :]
    turned = turned.to(values.dtype)

    if NUM_HEADS > 0:
        places = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(queries + places, turned, mask=(heads < NUM_HEADS)[:, None])
    if slot >= 0:
        if IS_FP8:
            stored_keys, stored_values = fp8_codes(turned.to(tl.float32)), fp8_codes(values.to(tl.float32))
        else:
            stored_keys, stored_values = turned.to(k_cache.dtype.element_ty), values.to(v_cache.dtype.element_ty)
        place = slot * (NUM_KV_HEADS * HEAD_DIM) + (heads - NUM_HEADS)[:, None] * HEAD_DIM + dims[None, :]
        is_key = (heads >= NUM_HEADS) & is_turned
        tl.store(k_cache + place, stored_keys, mask=is_key[:, None])
        is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & is_head
        tl.store(v_cache + place - NUM_KV_HEADS * HEAD_DIM, stored_values, mask=is_value[:, None])
