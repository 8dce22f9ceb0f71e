"""The front of the NextN layer in Triton, against the same in float64 with the concatenation written out."""

from __future__ import annotations

import pytest
import torch
from nextn.kernels.fp8_dequantize import dequantize
from nextn.kernels.fp8_quantize import quantize_per_channel
from nextn.kernels.matmul_config import MAX_TILES
from nextn.kernels.nextn_input import nextn_input, nextn_projection

from tests.kernels.references import quantize_blocks

EPS = 1e-5
SIZES = [(1, 64, 64), (3, 100, 70), (17, 640, 96), (64, 272, 130), (70, 192, 144)]
"""(T, H, N)"""


class Front:
    """Random tokens and tensors, the embedding's rows of another size than the hidden states."""

    def __init__(self, num_tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        vocab = 41
        self.ids = torch.randint(vocab, (num_tokens,))
        self.embedding = (torch.randn(vocab, size) * 0.02).to(dtype)
        self.hidden = (torch.randn(num_tokens, size) * 5).to(dtype)
        self.enorm, self.hnorm = ((1 + 0.3 * torch.randn(size)).to(dtype) for _ in range(2))
        self.device = device

    @property
    def inputs(self) -> list[torch.Tensor]:
        both = (self.ids, self.embedding, self.hidden, self.enorm, self.hnorm)
        return [t.to(self.device) for t in both]

    def normed(self) -> torch.Tensor:
        """[T, 2H] float64, rounded to the dtype as the product's input is."""
        halves = []
        for x, weight in ((self.embedding[self.ids], self.enorm), (self.hidden, self.hnorm)):
            wide = x.double()
            exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
            halves.append(exact.to(self.hidden.dtype).double())
        return torch.cat(halves, -1)


def _check(got: torch.Tensor, front: Front, wide_weight: torch.Tensor) -> None:
    """A normed value near the middle of two steps may round to either: one step of the dtype, on few values."""
    x, w = front.normed(), wide_weight.double()
    step = 2**-8 if front.hidden.dtype == torch.bfloat16 else 2**-11
    error = (got.cpu().double() - x @ w.T).abs()
    # Of independent errors, the squares add; six standard deviations of all values being a step off.
    assert bool((error <= 4e-6 * (x.abs() @ w.abs().T) + 6 * step * (x.square() @ w.square().T).sqrt()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_wide_weights(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    num_tokens, hidden, n = size
    front = Front(num_tokens, hidden, dtype, device)
    weight = (torch.randn(n, 2 * hidden) / hidden**0.5).to(dtype)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    got = nextn_projection(*front.inputs, EPS, weight.to(device), out_dtype=torch.float32, counters=counters)
    _check(got, front, weight)
    assert not counters.any(), "the counters are ready for the next product"
    assert nextn_projection(*front.inputs, EPS, weight.to(device)).dtype == dtype


@pytest.mark.parametrize("block", [None, (128, 128), (48, 32)])
@pytest.mark.parametrize("size", [*SIZES, (5, 256, 130)])
def test_fp8_weights(size: tuple[int, int, int], block: tuple[int, int] | None, device: torch.device) -> None:
    """Blocks of scales that cross from one half to the other (of 128, with H = 64, 100, 272, 192) included."""
    num_tokens, hidden, n = size
    front = Front(num_tokens, hidden, torch.bfloat16, device)
    weight = torch.randn(n, 2 * hidden) / hidden**0.5 * torch.logspace(-1, 1, 2 * hidden)
    codes, scale = quantize_per_channel(weight) if block is None else quantize_blocks(weight, block)
    moved = (codes.to(device), scale.to(device))
    got = nextn_projection(*front.inputs, EPS, *moved, block, out_dtype=torch.float32)
    _check(got, front, dequantize(codes, scale, block))


@pytest.mark.parametrize("num_tokens", [2, 70])
def test_the_embedding_comes_first(num_tokens: int, device: torch.device) -> None:
    """A weight that reads one half alone sees that half alone."""
    front = Front(num_tokens, 128, torch.bfloat16, device)
    eye, nothing = torch.eye(128).bfloat16(), torch.zeros(128, 128).bfloat16()
    first = nextn_projection(*front.inputs, EPS, torch.cat([eye, nothing], 1).to(device))
    second = nextn_projection(*front.inputs, EPS, torch.cat([nothing, eye], 1).to(device))
    normed = front.normed().bfloat16()
    torch.testing.assert_close(first.cpu(), normed[:, :128], rtol=2**-7, atol=0)
    torch.testing.assert_close(second.cpu(), normed[:, 128:], rtol=2**-7, atol=0)
    assert not torch.allclose(first, second)


def test_it_equals_the_two_steps_written_out(device: torch.device) -> None:
    front = Front(9, 320, torch.bfloat16, device)
    weight = (torch.randn(70, 640) / 18).bfloat16().to(device)
    got = nextn_projection(*front.inputs, EPS, weight, out_dtype=torch.float32)
    x = nextn_input(*front.inputs, EPS)
    torch.testing.assert_close(got, x.float() @ weight.float().T, rtol=1e-5, atol=1e-5)


def test_hidden_states_among_others(device: torch.device) -> None:
    """Rows that are not neighbours, as of a buffer that holds more."""
    front = Front(6, 128, torch.bfloat16, device)
    weight = torch.randn(64, 256).bfloat16().to(device)
    ids, embedding, hidden, enorm, hnorm = front.inputs
    among = torch.cat([torch.full_like(hidden, 7.0), hidden], 1)[:, 128:]
    got = nextn_projection(ids, embedding, among, enorm, hnorm, EPS, weight)
    assert torch.equal(got, nextn_projection(ids, embedding, hidden, enorm, hnorm, EPS, weight))


def test_batch_invariance_is_exact(device: torch.device) -> None:
    front = Front(130, 192, torch.bfloat16, device)
    weight = torch.randn(70, 384).bfloat16().to(device)
    ids, embedding, hidden, enorm, hnorm = front.inputs
    whole = nextn_projection(ids, embedding, hidden, enorm, hnorm, EPS, weight, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 129)):
        some = (ids[rows], embedding, hidden[rows], enorm, hnorm)
        assert torch.equal(nextn_projection(*some, EPS, weight, batch_invariant=True), whole[rows])


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    front = Front(0, 64, torch.bfloat16, device)
    assert nextn_projection(*front.inputs, EPS, torch.zeros(32, 128).bfloat16().to(device)).shape == (0, 32)


def test_without_a_gpu_torch_projects_in_float32() -> None:
    front = Front(5, 96, torch.float32, torch.device("cpu"))
    weight = torch.randn(40, 192)
    got = nextn_projection(*front.inputs, EPS, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), front.normed() @ weight.double().T, rtol=1e-4, atol=1e-4)
