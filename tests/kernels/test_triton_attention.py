"""Triton's attention over paged KV against dense attention in float64."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from nextn.kernels import gpu, paged_attention_triton
from nextn.kernels.attention_layout import AttentionLayout, make_attention_layout
from nextn.kernels.fp8_quantize import FP8, _quantize_reference
from nextn.kernels.paged_attention import paged_attention, paged_attention_quantized

from tests.kernels.references import has_fp8_units

SPANS = [(0, 1), (62, 1), (63, 4), (200, 5), (0, 16), (130, 17), (3, 70), (500, 1), (300, 6)]
"""First new position and number of new tokens."""


class Case:
    """Random queries, keys and values of sequences whose pages are shuffled; what no sequence wrote is NaN."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
        *,
        group: int = 3,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        page_size: int = 16,
        first_key: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.spans, self.first_key, self.scale = spans, first_key, head_dim**-0.5
        counts = [-(-(start + length) // page_size) for start, length in spans]
        order = iter((1 + torch.randperm(sum(counts))).tolist())  # page 0 is nobody's
        self.pages = [[next(order) for _ in range(count)] for count in counts]
        num_tokens = sum(length for _, length in spans)
        self.q = (torch.randn(num_tokens, group * num_kv_heads + 2, head_dim) * 2).to(dtype)[:, 2:]
        shape = (1 + sum(counts), page_size, num_kv_heads, head_dim)
        self.k, self.v = (torch.full(shape, float("nan")).to(kv_dtype or dtype) for _ in range(2))
        for (start, length), pages in zip(spans, self.pages, strict=True):
            for position in range(start + length):
                for cache in (self.k, self.v):
                    one = torch.randn(num_kv_heads, head_dim).to(cache.dtype)
                    cache[pages[position // page_size], position % page_size] = one
        self.layout = make_attention_layout(spans, self.pages, page_size, torch.device("cpu"), first_key=first_key)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention in float64 [T, num_heads, head_dim], and the same of the values' magnitudes."""
        q, outs, sizes = self.q.double(), [], []
        group, row = q.shape[1] // self.k.shape[2], 0
        for (start, length), pages in zip(self.spans, self.pages, strict=True):
            k, v = (
                cache[pages].double().flatten(0, 1)[: start + length].repeat_interleave(group, 1)
                for cache in (self.k, self.v)
            )
            scores = torch.einsum("nhd,khd->hnk", q[row : row + length], k) * self.scale
            keys = torch.arange(start + length)
            hidden = (keys > torch.arange(start, start + length)[:, None]) | (keys < self.first_key)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0)
            outs.append(torch.einsum("hnk,khd->nhd", weights, v))
            sizes.append(torch.einsum("hnk,khd->nhd", weights, v.abs()))
            row += length
        return torch.cat(outs), torch.cat(sizes)

    def attend(self, device: torch.device, *, batch_invariant: bool = False) -> torch.Tensor:
        return paged_attention(*self.there(device), batch_invariant=batch_invariant).cpu()

    def there(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionLayout, float]:
        """Queries, keys, values, layout and scale."""
        layout = self.layout
        moved = AttentionLayout(
            layout.starts.to(device),
            layout.cu_seqlens_q.to(device),
            layout.page_table.to(device),
            layout.page_size,
            layout.first_key,
            layout.max_query_len,
        )
        return self.q.to(device), self.k.to(device), self.v.to(device), moved, self.scale

    def check(self, device: torch.device, *, batch_invariant: bool = False) -> None:
        found = self.attend(device, batch_invariant=batch_invariant)
        exact, sizes = self.exact()
        assert found.dtype == self.q.dtype
        # The softmax's weights and the result are rounded once each; float32 sums lose a few last bits.
        unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[self.q.dtype]
        assert bool(((found.double() - exact).abs() <= 2 * unit * sizes + 1e-6).all())
        if not has_fp8_units(device):
            return
        codes, scales = paged_attention_quantized(*self.there(device), batch_invariant=batch_invariant)
        expected, expected_scales = _quantize_reference(found.flatten(1), found.shape[2])
        assert torch.equal(scales.cpu(), expected_scales)
        assert torch.equal(codes.cpu().float(), expected.float())


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("first_key", [0, 1])
@pytest.mark.parametrize(("group", "head_dim", "page_size"), [(1, 16, 1), (3, 64, 16), (12, 128, 64)])
def test_ragged_queries_over_shuffled_pages(
    group: int, head_dim: int, page_size: int, first_key: int, kv_dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(
        SPANS,
        group=group,
        num_kv_heads=1 if group > 3 else 2,
        head_dim=head_dim,
        page_size=page_size,
        first_key=first_key,
        kv_dtype=kv_dtype,
    )
    case.check(device)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float16, FP8),
        (torch.float32, torch.float32),
        (torch.float32, FP8),
        (torch.float32, torch.bfloat16),
    ],
)
def test_other_types(dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
    Case([(0, 1), (90, 4), (40, 20)], head_dim=32, dtype=dtype, kv_dtype=kv_dtype).check(device)


def test_fp8_without_fp8_units(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_fp8_units", lambda device: False)
    Case(SPANS[:5], kv_dtype=FP8).check(device)


def test_queries_of_any_size_meet_fp8_keys(device: torch.device) -> None:
    """Keys in FP8 take queries to float16, which bfloat16's largest and smallest values do not fit."""
    case = Case([(100, 3)], kv_dtype=FP8)
    case.q *= torch.tensor([1e5, 1e-30, 1.0]).bfloat16()[:, None, None]
    case.check(device)


@pytest.mark.parametrize("num_tokens", [1, 4, 20])
def test_many_splits_of_few_long_sequences(num_tokens: int, device: torch.device) -> None:
    case = Case([(1400, num_tokens), (3, num_tokens), (700, num_tokens)], group=12, num_kv_heads=1, head_dim=128)
    case.check(device)


def test_a_token_that_sees_no_key_gets_zeros(device: torch.device) -> None:
    for spans in ([(0, 1)], [(0, 3), (0, 20)]):
        case = Case(spans, first_key=1)
        found = case.attend(device)
        assert not found[0].any()
        case.check(device)
        case.check(torch.device("cpu"), batch_invariant=True)


def test_padding_is_left_alone(device: torch.device) -> None:
    """A CUDA graph's batch: fixed sizes, sequences without tokens, rows that belong to no sequence."""
    case = Case([(70, 4), (9, 2)])
    layout = case.layout
    rows, pages = torch.tensor([0, 4, 4, 6, 6]), torch.zeros(4, 300, dtype=torch.int64)
    pages[0, : layout.page_table.shape[1]], pages[2, : layout.page_table.shape[1]] = layout.page_table
    case.layout = AttentionLayout(torch.tensor([70, 0, 9, 0]), rows, pages, layout.page_size, 0, 4)
    exact, _ = case.exact()
    for invariant in (False, True):
        case.q = torch.cat([case.q[:6], torch.full_like(case.q[:3], float("nan"))])
        found = case.attend(device, batch_invariant=invariant)
        assert found[6:].isnan().all(), "nobody writes padding"
        torch.testing.assert_close(found[:6].double(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
def test_batch_invariance_is_exact(
    kv_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, with others, as one token, a draft's few or a prompt's many, over one program or several."""
    monkeypatch.setattr(paged_attention_triton, "INVARIANT_PART", 32)
    case = Case([(90, 1), (3, 4), (70, 20)], kv_dtype=kv_dtype, num_kv_heads=1, head_dim=16)
    case.check(device, batch_invariant=True)
    whole = case.attend(device, batch_invariant=True)
    row = 0
    for (start, length), pages in zip(case.spans, case.pages, strict=True):
        for first, last in ((0, length), (length - 1, length), (length // 2, length // 2 + 1)):
            alone = copy(case)
            alone.q = case.q[row + first : row + last]
            layout = make_attention_layout([(start + first, last - first)], [pages], 16, torch.device("cpu"))
            alone.layout = layout
            for processors in (0, 1 << 20):  # never, and always, an item per part
                monkeypatch.setattr(gpu, "num_processors", lambda device, n=processors: n)
                assert torch.equal(alone.attend(device, batch_invariant=True), whole[row + first : row + last])
        row += length


def test_the_reference_takes_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "suits", lambda *tensors: False)
    for kv_dtype in (torch.bfloat16, FP8):
        for first_key in (0, 1):
            case = Case(SPANS, first_key=first_key, kv_dtype=kv_dtype)
            for cache in (case.k, case.v):  # here, what nobody wrote is zeros
                cache.copy_(cache.float().nan_to_num(0))
            # Scores and weights are rounded to bfloat16 too.
            torch.testing.assert_close(case.attend(device).double(), case.exact()[0], rtol=0, atol=0.05)
