"""Triton's QKV epilogue against float64, and FP8 codes against torch's."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels import gpu
from nextn.kernels.fp8_quantize import FP8
from nextn.kernels.rope_and_cache import Rotation, rope_and_cache
from nextn.kernels.rotary import make_rotary_table

PAGES, PAGE_SIZE = 5, 4
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}
"""How much one rounding changes a value at most."""


def _epilogue(
    qkv: torch.Tensor,
    norm: torch.Tensor | None,
    num_kv_heads: int,
    rotary_dim: int,
    slots: torch.Tensor,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, and the caches [slots, num_kv_heads, head_dim], where 7 is what was there before."""
    head_dim = qkv.shape[2]
    table = make_rotary_table(head_dim, rotary_dim, 1e4, 100, device)
    positions = torch.tensor([3, 99, 0, 41, 7])[: len(qkv)].to(device)
    k, v = (torch.full((PAGES, PAGE_SIZE, num_kv_heads, head_dim), 7.0, device=device).to(kv_dtype) for _ in range(2))
    moved = None if norm is None else norm.to(device)
    q = rope_and_cache(qkv.to(device), moved, 1e-5, Rotation(table, positions, qkv.dtype), slots.to(device), k, v)
    return q.cpu(), k.cpu().flatten(0, 1), v.cpu().flatten(0, 1)


def _exact(
    qkv: torch.Tensor, norm: torch.Tensor | None, num_heads: int, rotary_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in float64, the norm's results rounded to qkv's type as such models do; and Σ |terms|."""
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    x = qkv[:, : num_heads + num_kv_heads].double()
    if norm is not None:
        weights = torch.cat([norm[:1].expand(num_heads, -1), norm[1:].expand(num_kv_heads, -1)])
        x = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(qkv.dtype).double()
        x = (x * weights.double()).to(qkv.dtype).double()
    table = make_rotary_table(qkv.shape[2], rotary_dim, 1e4, 100)
    at = torch.tensor([3, 99, 0, 41, 7])[: len(qkv)]
    terms = x * table.cos[at].double()[:, None], x[..., table.partner] * table.sin[at].double()[:, None]
    return terms[0] + terms[1], terms[0].abs() + terms[1].abs()


@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "rotary_dim"),
    [(96, 8, 128, 64), (6, 2, 16, 16), (0, 3, 64, 32), (5, 1, 32, 8)],
)
def test_queries_keys_and_values(
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    rotary_dim: int,
    with_norm: bool,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    qkv = (torch.randn(5, num_heads + 2 * num_kv_heads, dim) * torch.logspace(-2, 2, 5)[:, None, None]).to(dtype)
    norm = (1 + 0.3 * torch.randn(2, dim)).to(dtype) if with_norm else None
    slots = torch.tensor([11, 0, -1, 6, 19])  # the third row is padding
    (exact, parts), values = _exact(qkv, norm, num_heads, rotary_dim), qkv[:, num_heads + num_kv_heads :]
    q, k, v = _epilogue(qkv, norm, num_kv_heads, rotary_dim, slots, kv_dtype or dtype, device)
    assert q.dtype == dtype
    assert q.shape == (5, num_heads, dim)
    # A rounding, and two more of the norm's that may fall to the other side.
    tolerance = UNIT[dtype] * (3 if with_norm else 1)
    lost = torch.full_like(exact, tolerance * float(exact.abs().max()) * 2**-3)
    if dtype == torch.float32:  # last bits of both terms and of their sum; behind a norm, of what it made of each too
        lost = parts * 2**-24 * (8 if with_norm else 2)
    limit = lost + tolerance * exact.abs()
    assert bool(((q.double() - exact[:, :num_heads]).abs() <= limit[:, :num_heads]).all())
    kept = slots[slots >= 0]
    others = [i for i in range(PAGES * PAGE_SIZE) if i not in kept]
    for cache in (k, v):
        assert bool((cache[others].float() == 7).all()), "only the given slots are written"
    rows = slots >= 0
    if kv_dtype is None:
        assert torch.equal(v[kept], values[rows])
        assert bool(((k[kept].double() - exact[rows, num_heads:]).abs() <= limit[rows, num_heads:]).all())
    else:
        assert torch.equal(v[kept].float(), values[rows].float().clamp(-448, 448).to(FP8).float())
        # Half a step of 3 bits of mantissa, and of the smallest step, 2⁻⁹.
        limited = exact[rows, num_heads:].clamp(-448, 448)
        error = (k[kept].double() - limited).abs()
        assert bool((error <= limited.abs() * (2**-4 + tolerance) + 2**-10 + lost[rows, num_heads:]).all())


def test_every_value_gets_torchs_fp8_code(device: torch.device) -> None:
    """Every bfloat16, among them all ties between codes, subnormal codes, infinities and NaN."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(4, 128, 128)
    qkv = torch.cat([torch.zeros_like(values), values], 1)
    slots = torch.arange(4)
    cache = torch.zeros(4, 1, 128, 128, dtype=FP8, device=device)
    table = make_rotary_table(128, 64, 1e4, 8, device)
    rotation = Rotation(table, torch.zeros(4, dtype=torch.int64, device=device), torch.bfloat16)
    rope_and_cache(qkv.to(device), None, 1e-5, rotation, slots.to(device), torch.zeros_like(cache), cache)
    found, expected = cache.cpu().view(torch.uint8)[:, 0], values.float().clamp(-448, 448).to(FP8).view(torch.uint8)
    is_nan = values.isnan()
    assert torch.equal(found[~is_nan], expected[~is_nan])
    assert bool(((found[is_nan] & 0x7F) == 0x7F).all())


@pytest.mark.parametrize("num_heads", [4, 0])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
def test_the_reference_does_the_same(
    kv_dtype: torch.dtype, num_heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = torch.randn(5, num_heads + 4, 64).bfloat16() * 5
    norm = torch.rand(2, 64).bfloat16()
    arguments = (qkv, norm, 2, 32, torch.tensor([-1, 3, 8, -1, 0]), kv_dtype, device)
    ours = _epilogue(*arguments)
    monkeypatch.setattr(gpu, "suits", lambda *tensors: False)
    theirs = _epilogue(*arguments)
    for mine, its in zip(ours, theirs, strict=True):
        # The reference rounds cosines and products to bfloat16 too; FP8 has half a step of 2⁻⁴.
        torch.testing.assert_close(mine.float(), its.float(), rtol=2**-6 if mine.dtype != FP8 else 2**-3, atol=0.08)


def test_rows_that_lie_apart_and_no_rows(device: torch.device) -> None:
    wide = torch.randn(5, 20, 16).bfloat16()
    slots = torch.arange(5)
    apart = _epilogue(wide[:, :8], None, 2, 8, slots, torch.bfloat16, device)
    packed = _epilogue(wide[:, :8].contiguous(), None, 2, 8, slots, torch.bfloat16, device)
    assert all(torch.equal(a, b) for a, b in zip(apart, packed, strict=True))
    q, _, _ = _epilogue(wide[:0, :8], None, 2, 8, slots[:0], torch.bfloat16, device)
    assert q.shape == (0, 4, 16)
