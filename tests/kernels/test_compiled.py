"""The compiled CPU kernels against float64, against their torch references, and in every batch the same to the bit.

All of it for every instruction set that this processor has.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nextn.kernels import native
from nextn.kernels.fused_moe import PackedExperts, dense_mlp, fused_moe, pack_experts
from nextn.kernels.linear import PackedWeight, linear, pack_weight
from nextn.kernels.nextn_input import nextn_input
from nextn.kernels.paged_attention import make_attention_layout, paged_attention
from nextn.kernels.rms_norm import rms_norm
from nextn.kernels.rope_and_cache import Rotation, rope_and_cache
from nextn.kernels.rotary import make_rotary_table
from nextn.kernels.router import route

pytestmark = pytest.mark.skipif(native.cpu is None, reason="the installation had no C compiler")

RELATIVE = 2e-6
"""Of the largest output: sums of a few hundred float32 products."""

KINDS = ["float32", "bfloat16", "fp8"]
NAN = float("nan")


@pytest.fixture(params=["avx512", "avx2", "any"], autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.cpu is not None
    if request.param not in native.cpu.instruction_sets:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(native, "cpu", native.cpu.instruction_sets[request.param])


def random_weight(kind: str, rows: int, columns: int, seed: int, *, bias: bool = False) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 30
    offset = torch.randn(rows, generator=generator) if bias else None
    if kind == "fp8":
        codes = weight.to(torch.float8_e4m3fn)
        scale = torch.rand(rows, generator=generator) + 0.01
        packed = pack_weight(codes.float() * scale[:, None], offset, codes=codes, scale=scale)
    else:
        packed = pack_weight(weight.bfloat16().float() if kind == "bfloat16" else weight, offset)
    assert packed.address
    assert packed.panels is not None
    assert packed.panels.element_size() == {"float32": 4, "bfloat16": 2, "fp8": 1}[kind]
    return packed


def assert_near(found: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE) -> None:
    assert found.dtype == torch.float32
    assert (found.double() - expected.double()).abs().max() <= relative * expected.abs().max()


def with_torch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(native, "cpu", None)
        return run()


def test_the_widest_instruction_set_is_taken() -> None:
    from nextn.kernels import _cpu

    as_torch_finds = {"AVX512": ["avx512", "avx2", "any"], "AVX2": ["avx2", "any"]}
    assert list(_cpu.instruction_sets) == as_torch_finds.get(torch.backends.cpu.get_cpu_capability(), ["any"])


def test_every_fp8_code_is_read_as_torch_reads_it() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = pack_weight(codes.float()[:, None], codes=codes[:, None], scale=torch.ones(len(codes)))
    assert torch.equal(linear(torch.ones(1, 1), weight)[0], codes.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 3), (63, 17), (64, 64), (65, 33), (200, 256), (512, 96)])
def test_linear(kind: str, rows: int, columns: int) -> None:
    weight = random_weight(kind, rows, columns, seed=rows, bias=True)
    assert weight.bias is not None
    x, residual = torch.randn(23, columns), torch.randn(23, rows)
    exact = x.double() @ weight.weight.double().t() + weight.bias
    for m in (1, 2, 3, 4, 5, 6, 7, 23):
        assert_near(linear(x[:m], weight), exact[:m])
        assert_near(linear(x[:m], weight, residual[:m]), exact[:m] + residual[:m])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_product_is_the_same_to_the_bit_in_any_batch(kind: str) -> None:
    weight = random_weight(kind, 100, 70, seed=0)
    x = torch.randn(13, 70)
    whole = linear(x, weight)
    for m in range(1, 13):
        assert torch.equal(linear(x[:m], weight), whole[:m])


def random_experts(num_experts: int, hidden: int, inner: int, shared_inner: int) -> PackedExperts:
    sizes = [(inner, e) for e in range(num_experts)]
    w13 = tuple(random_weight("fp8", 2 * size, hidden, seed=e) for size, e in sizes)
    w2 = tuple(random_weight("fp8", hidden, size, seed=100 + e) for size, e in sizes)
    shared = None
    if shared_inner:
        shared = random_weight("bfloat16", 2 * shared_inner, hidden, 7), random_weight("fp8", hidden, shared_inner, 8)
    packed = pack_experts(w13, w2, shared)
    assert packed.addresses is not None
    return packed


def exact_mlp(x: torch.Tensor, w13: PackedWeight, w2: PackedWeight) -> torch.Tensor:
    gate, up = (x.double() @ w13.weight.double().t()).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w2.weight.double().t()


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("shared_inner", [0, 24, 80])
@pytest.mark.parametrize(("hidden", "inner", "top_k"), [(64, 32, 2), (70, 13, 1), (33, 96, 8)])
def test_fused_moe(
    num_tokens: int, shared_inner: int, hidden: int, inner: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = random_experts(8, hidden, inner, shared_inner)
    x, residual = torch.randn(num_tokens, hidden) * 0.01, torch.randn(num_tokens, hidden)
    ids = torch.rand(num_tokens, 8).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k)
    exact = residual.double()
    for t in range(num_tokens):
        for j in range(top_k):
            e = int(ids[t, j])
            exact[t] += weights[t, j].double() * exact_mlp(x[t], experts.w13[e], experts.w2[e])
    if experts.shared is not None:
        exact += exact_mlp(x, *experts.shared)
    found = fused_moe(x, ids, weights, experts, residual)
    assert_near(found, exact)
    assert_near(with_torch(monkeypatch, lambda: fused_moe(x, ids, weights, experts, residual)), exact)
    alone = fused_moe(x[:1], ids[:1], weights[:1], experts, residual[:1])
    assert torch.equal(alone, found[:1])


def test_a_dense_mlp() -> None:
    w13, w2 = random_weight("fp8", 2 * 40, 24, seed=1), random_weight("float32", 24, 40, seed=2)
    x = torch.randn(9, 24) * 0.01
    assert_near(dense_mlp(x, pack_experts((), (), (w13, w2))), exact_mlp(x, w13, w2))


@pytest.mark.parametrize(("n_group", "topk_group", "top_k"), [(1, 1, 2), (1, 1, 8), (4, 2, 4), (8, 3, 6)])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_router(
    n_group: int, topk_group: int, top_k: int, norm_topk_prob: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, bias, x = pack_weight(torch.randn(32, 40)), torch.randn(32), torch.randn(50, 40)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return route(
            x,
            gate,
            bias,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=2.5,
        )

    weights, ids = run()
    with monkeypatch.context() as patched:
        patched.setattr(native, "cpu", None)
        their_weights, their_ids = run()
    order, their_order = ids.argsort(1), their_ids.argsort(1)
    assert torch.equal(ids.gather(1, order), their_ids.gather(1, their_order))
    assert_near(weights.gather(1, order), their_weights.gather(1, their_order))


@pytest.mark.parametrize("size", [1, 16, 40, 256])
def test_rms_norm(size: int) -> None:
    x, weight = torch.randn(5, size), torch.randn(size)
    wide = x.double()
    assert_near(rms_norm(x, weight, 1e-5), wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight)


def test_nextn_input() -> None:
    ids, embedding, hidden = torch.tensor([3, 0, 6]), torch.randn(7, 40), torch.randn(3, 40)
    enorm, hnorm = torch.randn(40), torch.randn(40)
    found = nextn_input(ids, embedding, hidden, enorm, hnorm, 1e-5)
    assert_near(found[:, :40], torch.nn.functional.rms_norm(embedding[ids].double(), (40,), enorm.double(), 1e-5))
    assert_near(found[:, 40:], torch.nn.functional.rms_norm(hidden.double(), (40,), hnorm.double(), 1e-5))


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (64, 32), (128, 64)])
def test_rope_and_cache(dim: int, rotary_dim: int, with_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_rotary_table(dim, rotary_dim, 1e4, 100)
    rotation = Rotation(table, torch.tensor([5, 99, 0]), torch.float32)
    qkv = torch.randn(3, 4 + 2 + 2, dim)
    norm = torch.randn(2, dim) if with_norm else None
    slots = torch.tensor([11, -1, 6])  # the second row is padding

    def run() -> torch.Tensor:
        k, v = torch.full((3, 4, 2, dim), NAN), torch.full((3, 4, 2, dim), NAN)
        q = rope_and_cache(qkv.clone(), norm, 1e-5, rotation, slots, k, v)
        assert k.view(12, -1).isnan().any(1).tolist() == [i not in (11, 6) for i in range(12)]
        stored = slots[slots >= 0]
        return torch.cat([q.flatten(), k.view(12, -1)[stored].flatten(), v.view(12, -1)[stored].flatten()])

    assert_near(run(), with_torch(monkeypatch, run))


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("first_key", [0, 1])
@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_paged_attention(dim: int, first_key: int, num_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    page_size, num_kv_heads = 4, 2
    spans = [(first_key, 1), (17, 3), (30, 40), (60, 1)]
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    tables = [shuffled[16 * i : 16 * i + 18] for i in range(3)] + [shuffled[48:]]
    k, v = torch.randn(64, page_size, num_kv_heads, dim), torch.randn(64, page_size, num_kv_heads, dim)
    q = torch.randn(45, num_heads + 4, dim)[:, :num_heads]  # rows apart, as in the product of q, k and v
    layout = make_attention_layout(spans, tables, page_size, q.device, first_key=first_key)
    exact, row = torch.empty(45, num_heads, dim, dtype=torch.float64), 0
    for (start, length), pages in zip(spans, tables, strict=True):
        keys = k[pages].view(-1, num_kv_heads, dim).double().repeat_interleave(num_heads // 2, 1)
        values = v[pages].view(-1, num_kv_heads, dim).double().repeat_interleave(num_heads // 2, 1)
        for position in range(start, start + length):
            seen = slice(first_key, position + 1)
            scores = torch.einsum("hd,khd->hk", q[row].double(), keys[seen]) * dim**-0.5
            exact[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values[seen])
            row += 1
    found = paged_attention(q, k, v, layout, dim**-0.5)
    assert_near(found, exact)
    assert_near(with_torch(monkeypatch, lambda: paged_attention(q, k, v, layout, dim**-0.5)), exact)
    alone = make_attention_layout([(62, 1)], [tables[2]], page_size, q.device, first_key=first_key)
    assert torch.equal(paged_attention(q[36:37], k, v, alone, dim**-0.5), found[36:37])


def test_a_token_that_sees_no_key_gets_zeros() -> None:
    layout = make_attention_layout([(0, 2)], [[0]], 4, torch.device("cpu"), first_key=1)
    found = paged_attention(torch.randn(2, 2, 16), *torch.randn(2, 1, 4, 1, 16), layout, 0.25)
    assert not found[0].any()
    assert found[1].isfinite().all()


def test_a_model_of_other_types_is_left_to_torch() -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    weight = pack_weight(torch.randn(4, 8, dtype=torch.bfloat16))
    assert weight.address == 0
    assert linear(x, weight).dtype == torch.bfloat16
