"""Addresses are ints (0 for none); sizes are ints; see cpu/kernels.inc."""

from types import ModuleType

interface: int
"""See ``native.INTERFACE``."""

instruction_sets: dict[str, ModuleType]
"""This module for every instruction set that the processor has, the widest first, which is the module's own."""

def linear(weight: int, x: int, num_rows: int, residual: int, out: int, /) -> None: ...
def rms_norm(x: int, weight: int, num_rows: int, size: int, eps: float, out: int, /) -> None: ...
def nextn_input(
    ids: int,
    embedding: int,
    hidden: int,
    enorm: int,
    hnorm: int,
    num_tokens: int,
    size: int,
    eps: float,
    out: int,
    /,
) -> None: ...
def fused_moe(
    w13: int,
    w2: int,
    num_experts: int,
    has_shared: int,
    x: int,
    num_tokens: int,
    top_k: int,
    ids: int,
    weights: int,
    residual: int,
    out: int,
    /,
) -> None: ...
def route(
    gate: int,
    bias: int,
    x: int,
    num_tokens: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: int,
    factor: float,
    weights: int,
    ids: int,
    /,
) -> None: ...
def rope_and_cache(
    qkv: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    half: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    cos: int,
    sin: int,
    positions: int,
    slots: int,
    k: int,
    v: int,
    /,
) -> None: ...
def paged_attention(
    q: int,
    q_stride: int,
    k: int,
    v: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    page_size: int,
    num_seqs: int,
    starts: int,
    cu_seqlens_q: int,
    page_table: int,
    max_pages: int,
    first_key: int,
    scale: float,
    out: int,
    /,
) -> None: ...
