"""Triton, where it is installed; elsewhere every kernel's torch reference runs, on whatever device the tensors are on.

All launches go through ``launch``, so that one place says what a launch is made of. A kernel's tensors, sizes and
strides are positional; what it is compiled for is a keyword. Over tensors without memory, of torch's device ``meta``, a
launch only compiles, for the card that Triton finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without
    triton = None
    tl = None

__all__ = [
    "can_be_described",
    "cdiv",
    "compiling_in",
    "described",
    "has_descriptors",
    "has_fp8_units",
    "jit",
    "launch",
    "launch_options",
    "make_launchers",
    "next_power_of_2",
    "num_processors",
    "prefetch_bytes",
    "prefetch_rows",
    "shared_memory",
    "starts_early",
    "suits",
    "tl",
    "upload",
    "wait_for_predecessor",
]


PREFETCH_BYTES = 512
"""With a wave of programs of 64 rows, some 10 MB: what memory delivers while a small kernel runs."""


def jit(function: Callable[..., Any] | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """``triton.jit``; the bare function, which nobody calls, where there is no Triton.

    varying: integers that change from step to step, and tensors that begin anywhere in others, so that one compiled
        kernel serves all their values, and all alignments
    """
    if function is None:
        return partial(jit, varying=varying)
    return triton.jit(function, do_not_specialize=varying) if triton is not None else function


def suits(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton's kernels can take these tensors."""
    if triton is None:
        return False
    for x in tensors:  # noqa: SIM110 - asked several times a layer; a generator takes twice as long
        if x is not None and not (x.is_cuda or x.is_meta):
            return False
    return True


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
) -> None:
    """Run a kernel on the current stream; or have it compiled and kept, where its tensors have no memory.

    grid: programs along up to three axes
    arguments: its tensors, sizes and strides, in order, a tensor first; constants: its compile-time constants, by name
    """
    first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0].base
    options = launch_options(num_warps, num_stages, starts_early=starts_early(first.device))
    if first.is_meta:
        kernel.warmup(*arguments, grid=grid, **constants, **options)
    else:
        kernel[grid](*arguments, **constants, **options)


@contextmanager
def compiling_in(pool: Executor) -> Iterator[None]:
    """Launches over tensors without memory only ask the pool to compile, and the end of the context waits for it."""
    with triton.AsyncCompileMode(pool) as compiling:
        yield
        asked = list(compiling.future_kernels.values())  # which the end of the context empties
    make_launchers(pool, [kernel.result() for kernel in asked])


def make_launchers(pool: Executor, kernels: Iterable[Any]) -> None:
    """Have what launches compiled kernels made, and kept on disk, one for all that take arguments of the same types.

    Triton 3.6 has a C compiler make it, when a kernel is first launched, which takes as long as to compile a small one.
    """

    def make(kernel: Any) -> None:
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)

    by_signature = {str(kernel.src.signature): kernel for kernel in kernels}
    list(pool.map(make, by_signature.values()))


def launch_options(num_warps: int, num_stages: int, *, starts_early: bool) -> dict[str, Any]:
    """What every kernel is compiled with beside its own constants."""
    return {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
        "launch_pdl": starts_early,
        "EARLY": starts_early,
    }


@jit
def wait_for_predecessor(EARLY: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
    """Every kernel calls this before it reads or writes memory; see ``starts_early``.

    It waits until the launch before has ended and its stores are seen, then lets the next one's programs start. So one
    launch at most is ahead of its turn, and what was stored two launches before may be read without waiting; past the
    L1 cache (``.cg``), unless it never changes.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def prefetch_rows(rows, num_elements, PREFETCH: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
    """Have the beginnings of rows brought to the L2 cache, which takes no registers and is not waited for.

    rows: [R] pointers, aligned to 16 bytes; num_elements: of each, whose bytes are a multiple of 16
    PREFETCH: most bytes of each
    """
    part = tl.arange(0, 2)[None, :] * (PREFETCH // 2)
    places = rows.to(tl.uint64)[:, None] + part.to(tl.uint64)
    num_bytes = num_elements * (rows.dtype.scalar.element_ty.primitive_bitwidth // 8)
    sizes = tl.minimum(num_bytes - part, PREFETCH // 2) + tl.zeros(places.shape, tl.int32)
    tl.inline_asm_elementwise(
        """{
        .reg .pred is_wanted;
        setp.gt.s32 is_wanted, $2, 0;
        @is_wanted cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [places, sizes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def has_fp8_units(device: torch.device) -> bool:
    """Whether the card multiplies float8_e4m3fn (compute capability 8.9 and up)."""
    return _card(device).capability >= (8, 9)


def has_descriptors(device: torch.device) -> bool:
    """Whether the card copies tiles by descriptor (its tensor memory accelerator; compute capability 9.0 and up)."""
    return _card(device).capability >= (9, 0)


def starts_early(device: torch.device) -> bool:
    """Whether a kernel's programs start while the launch before still runs (programmatic dependent launch, 9.0 and up).

    What a launch costs, and what a kernel can do before it needs its inputs, then hides behind its predecessor.
    """
    return _card(device).capability >= (9, 0)


def prefetch_bytes(weight: torch.Tensor) -> int:
    """How much of each row of a weight [..., K] a kernel may ask for before its inputs are there; 0 for nothing."""
    if not starts_early(weight.device) or weight.shape[-1] * weight.itemsize % 16 or weight.data_ptr() % 16:
        return 0
    return PREFETCH_BYTES


def can_be_described(x: torch.Tensor) -> bool:
    """Whether a matrix lies as descriptors want it: rows contiguous, and aligned to 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def described(x: torch.Tensor, block: tuple[int, int]) -> Any:
    """A matrix, for a kernel that loads it in tiles of ``block``; what lies beyond its ends is read as zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, list(block))


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the card."""
    return _card(device).num_processors


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    return _card(device).shared_memory


class _Card(NamedTuple):
    capability: tuple[int, int]
    num_processors: int
    shared_memory: int


def _card(device: torch.device) -> _Card:
    return _card_that_triton_finds() if device.type == "meta" else _card_of(device)


@lru_cache
def _card_of(device: torch.device) -> _Card:
    properties = torch.cuda.get_device_properties(device)
    return _Card(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor - 1024,  # CUDA keeps a KiB
    )


def _card_that_triton_finds() -> _Card:
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    major, minor = divmod(driver.get_current_target().arch, 10)
    return _Card((major, minor), properties["multiprocessor_count"], properties["max_shared_mem"])


def upload(values: Any, *, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The host's numbers as a tensor; torch's own way to a GPU would wait for all that the device has still to do."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return on_host(values, device=device, dtype=dtype).to(device, non_blocking=True)


def on_host(values: Any, *, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The host's numbers, or numpy's array of them, as a tensor that ``device`` can copy while the host goes on."""
    made = torch.as_tensor(values, dtype=dtype)
    return made.pin_memory() if device.type == "cuda" else made


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
