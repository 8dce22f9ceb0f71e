"""What can be wrong with the numbers themselves: scales that cannot scale, norms stored in another convention, codes
taken for weights.

Without torch: the doctor reads with these functions too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from nextn.checkpoint.fit import FLOATS
from nextn.checkpoint.header import TensorInfo
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.layout import SCALES, ExpectedTensor, Layout
from nextn.errors import CheckpointError

FloatArray = npt.NDArray[np.floating]

SHIFTED_MEAN = 0.25
SHIFTED_SHARE = 0.2
"""A norm looks shifted by one if its mean is below the first and at least the second of its weights are ≤ 0.

Published GLM norms multiply as they are. A trained norm may well have a small mean (early layers, 0.02 - 0.1), so the
mean alone proves nothing; but its weights start at 1 and are positive almost to the last one. Stored as w - 1, weights
that are spread around 1 are spread around 0, and weights below 1 are all negative. Norms that grew far above 1 escape.
"""

LARGEST_MEDIAN = 4.0
"""Half of the weights in a row of a trained linear are smaller than this by far: 0.02 is usual. FP8 codes that were
stored without their scales, and codes multiplied by a scale's reciprocal, are larger: codes have medians of 15 to 160.
"""

LEAST_COSINE = 0.5
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class NormFigures:
    """mean: of the weights; negative: share of them that is ≤ 0; spread: largest minus smallest."""

    name: str
    mean: float
    negative: float
    spread: float

    @property
    def looks_shifted(self) -> bool:
        return self.mean < SHIFTED_MEAN and self.negative >= SHIFTED_SHARE


def check_scale(name: str, values: FloatArray) -> None:
    """Raises CheckpointError if a scale is zero, negative, infinite or NaN, with the first such value."""
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        first = float(values[bad].reshape(-1)[0])
        raise CheckpointError(
            f"{name}: holds a scale that is zero, negative, infinite or NaN (found {first}, expected a number above "
            "0); quantize the checkpoint again"
        )


def check_scales(index: CheckpointIndex, layout: Layout) -> None:
    """As ``check_scale``, of every scale of the layout."""
    names = [tensor.name for tensor in layout.tensors() if tensor.role in SCALES]
    for name, values in read_floats(index, names):
        check_scale(name, values)


def check_biases(index: CheckpointIndex, layout: Layout) -> None:
    """Raises CheckpointError if a bias, of a linear or a router, is infinite or NaN. A router's would show nowhere."""
    names = [tensor.name for tensor in layout.tensors() if may_be_zero(tensor)]
    for name, values in read_floats(index, names):
        check_finite(name, values)


def check_weights(index: CheckpointIndex, layout: Layout, *, all_shards: bool) -> None:
    """Look at the first row of linears, router, embedding and head.

    all_shards: of every expert and part, not of one of each fused module
    Raises CheckpointError if its weights are NaN, infinite, or as large as FP8 codes without their scales; or if that
    row, and then all others, are zero.
    """
    modules = {
        name: linear.scheme.scale_suffix
        for linear in layout.linears
        for name, _ in (linear.shards if all_shards else linear.shards[:1])
    }
    weights = [
        *(f"{name}.weight" for name in modules),
        *(one.name for one in layout.others if one.role == "plain" and not may_be_zero(one)),
    ]
    scales = {f"{name}.{suffix}" for name, suffix in modules.items() if suffix is not None}
    medians: dict[str, float] = {}
    for name, row in read_floats(index, [*weights, *scales], first_row=True):
        if name in scales:
            check_scale(name, row)
        else:
            check_finite(name, row)
        if not row.any() and _is_zero(index.tensors[name]):
            raise all_zero(name)
        medians[name] = float(np.median(abs(row)))
    for name, suffix in modules.items():
        median = medians[f"{name}.weight"] * (1.0 if suffix is None else medians[f"{name}.{suffix}"])
        if median > LARGEST_MEDIAN:
            with_scale = "" if suffix is None else f", times {suffix},"
            raise CheckpointError(
                f"{name}.weight: half of its first row{with_scale} is larger than {median:.3g}, expected below "
                f"{LARGEST_MEDIAN:g}: these are FP8 codes without their scale, or with its reciprocal; quantize the "
                "checkpoint again"
            )


def check_norms(index: CheckpointIndex, layout: Layout) -> list[NormFigures]:
    """The figures of every norm.

    Raises CheckpointError if most norms of the target, of the draft's block, or the draft's own three look shifted, or
    one is infinite, NaN, or nothing but zeros.
    """
    norms = [tensor for tensor in layout.tensors() if tensor.role == "norm"]
    figures = [_figures(name, values) for name, values in read_floats(index, [tensor.name for tensor in norms])]
    groups: dict[bool, list[NormFigures]] = {}
    for one in figures:
        groups.setdefault(one.name.endswith((".enorm.weight", ".hnorm.weight", ".shared_head.norm.weight")), []).append(
            one
        )
    for group in groups.values():
        shifted = [one for one in group if one.looks_shifted]
        if 2 * len(shifted) > len(group):
            first = shifted[0]
            raise CheckpointError(
                f"{first.name}: mean {first.mean:.3f}, {first.negative:.0%} of its weights are not above 0, and "
                f"{len(shifted)} of {len(group)} such norms are alike: they are stored shifted by one (w - 1), "
                "expected as they multiply; add 1 to the norm weights"
            )
    return figures


def check_tied_head(index: CheckpointIndex, head: str, embedding: str) -> None:
    """Raises CheckpointError if a head that config.json ties to the embedding is in the files and differs from it."""
    if head not in index.tensors or embedding not in index.tensors:
        return
    ours, theirs = index.tensors[head], index.tensors[embedding]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape) or not _same_bytes(ours, theirs):
        raise CheckpointError(
            f"{head}: differs from {embedding}, but config.json says tie_word_embeddings; set it to false, or remove "
            "the tensor"
        )


def check_alike(index: CheckpointIndex, lender: CheckpointIndex, name: str) -> None:
    """Of a tensor that both checkpoints may have: raises CheckpointError if its first rows are of two models.

    Rows of two trainings of one model point the same way; those of two models have nothing to do with each other.
    """
    if not all(name in one.tensors and one.tensors[name].dtype in FLOATS for one in (index, lender)):
        return
    (ours,), (theirs,) = (
        [row.astype(np.float64) for _, row in read_floats(one, [name], first_row=True)] for one in (index, lender)
    )
    size = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    if ours.shape == theirs.shape and float(ours @ theirs) < LEAST_COSINE * size:
        raise CheckpointError(
            f"--speculative-draft-model-path {index.folder}: {name}: its first row has a cosine of "
            f"{float(ours @ theirs) / size:.2f} with the target's, expected at least {LEAST_COSINE:g}: the NextN layer "
            "has none of its own, and was trained with that of another model; take one of the same model"
        )


def check_finite(name: str, values: FloatArray) -> None:
    """Raises CheckpointError if a value is infinite or NaN, with the first such value."""
    bad = values[~np.isfinite(values)]
    if bad.size:
        raise CheckpointError(f"{name}: holds {float(bad[0])}, expected finite numbers; download the checkpoint again")


def all_zero(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: holds nothing but zeros, as a part of a file that was never written; download the checkpoint again"
    )


def may_be_zero(tensor: ExpectedTensor) -> bool:
    """Biases, a router's too: training may leave them at zero."""
    return tensor.role == "bias" or tensor.kind == "router bias"


def read_floats(
    index: CheckpointIndex, names: Iterable[str], *, first_row: bool = False
) -> Iterator[tuple[str, FloatArray]]:
    """(name, values) of floating-point tensors, in the order they lie in the files. first_row: and no others, flat

    Raises CheckpointError if a file cannot be read, or has been cut off since its header was.
    """
    ordered = sorted(names, key=lambda name: (index.tensors[name].file, index.tensors[name].start))
    with ExitStack() as stack:
        streams: dict[Path, BinaryIO] = {}
        for name in ordered:
            info = index.tensors[name]
            num_bytes = info.num_bytes // info.shape[0] if first_row and info.shape else info.num_bytes
            try:
                if info.file not in streams:
                    streams[info.file] = stack.enter_context(info.file.open("rb"))
                streams[info.file].seek(info.start)
                raw = streams[info.file].read(num_bytes)
            except OSError as error:
                raise CheckpointError(f"{info.file}: {name} cannot be read ({error}); download it again") from None
            if len(raw) != num_bytes:
                raise CheckpointError(f"{info.file}: was cut off while it was read, at {name}; download it again")
            values = _decode(info.dtype, raw)
            yield name, values if first_row else values.reshape(info.shape)


def _decode(dtype: str, raw: bytes) -> FloatArray:
    if dtype == "F8_E4M3":
        return _fp8_values()[np.frombuffer(raw, np.uint8)]
    if dtype == "BF16":  # the upper half of a float32
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


@cache
def _fp8_values() -> FloatArray:
    """Of each code of float8_e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa; no infinities."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    size[codes & 127 == 127] = np.nan
    return np.where(codes < 128, size, -size)


def _figures(name: str, values: FloatArray) -> NormFigures:
    check_finite(name, values)
    if not values.any():
        raise CheckpointError(
            f"{name}: holds nothing but zeros: this part of the file was never written, or norms are stored shifted by "
            "one (w - 1) and were never trained; download the checkpoint again, or take one that was trained"
        )
    exact = values.astype(np.float64)
    return NormFigures(name, float(exact.mean()), float((exact <= 0).mean()), float(exact.max() - exact.min()))


def _is_zero(tensor: TensorInfo) -> bool:
    """Whether every byte is."""
    return not any(np.frombuffer(piece, np.uint8).any() for piece in _pieces(tensor))


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    return all(first == second for first, second in zip(_pieces(a), _pieces(b), strict=True))


def _pieces(tensor: TensorInfo) -> Iterator[bytes]:
    """The tensor's bytes. Raises CheckpointError if they cannot be read."""
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            for done in range(0, tensor.num_bytes, _CHUNK):
                yield stream.read(min(_CHUNK, tensor.num_bytes - done))
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read ({error}); download it again") from None
