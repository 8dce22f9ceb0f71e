"""Decode steps on the device: recorded as CUDA graphs where that is possible, and launched without being waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from nextn.kernels.gpu import on_host
from nextn.kernels.verify import NO_TOKEN
from nextn.protocol.ranks import DecodeBatch
from nextn.speculative.decode_state import DecodeState
from nextn.speculative.decode_step import DecodeRows, DecodeStep

logger = logging.getLogger(__name__)


class Masks(NamedTuple):
    """What the sequences in some slots may go on with. allowed: [n, ⌈V / 32⌉] int32, see ``Grammars.allowed``"""

    slots: list[int]
    allowed: np.ndarray


class DecidedTokens:
    """What a launched step decides, as soon as it is known. tokens: [S, k + 1] int64, see ``DecodeStep.run``."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[list[int]]:
        """Wait for the step. Returns the tokens that each sequence got; the last was not drafted."""
        if self._event is not None:
            self._event.synchronize()
        return [[token for token in row if token != NO_TOKEN] for row in self._tokens.tolist()]


class _Recording:
    """A step for a fixed number of sequences. rows: [3, S] int64, what it reads; output: what it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, rows: torch.Tensor, output: torch.Tensor) -> None:
        self.graph = graph
        self.rows = rows
        self.output = output


class DecodeRunner:
    """Owns the recordings. On a device without them each step is launched kernel by kernel."""

    def __init__(self, step: DecodeStep, state: DecodeState) -> None:
        self._step = step
        self._state = state
        self._recordings: dict[tuple[int, int, bool], _Recording] = {}
        self._sizes: tuple[int, ...] = ()

    @property
    def reach(self) -> int:
        """The most entries of the draft layer that may be missing of a sequence before its last token's."""
        return self._state.reach

    def launch(self, batch: DecodeBatch, masks: Masks | None = None) -> DecidedTokens:
        """Start a step on the current stream, after all that was started before.

        masks: of sequences that a grammar holds
        """
        self._state.apply(batch.patches)
        if masks is not None:
            self._state.mask(masks.slots, masks.allowed)
        num_seqs = len(batch.slots)
        size = next((size for size in self._sizes if size >= num_seqs), num_seqs)
        rows = self._rows(batch, size)
        recording = self._recordings.get((size, batch.num_drafts, batch.is_greedy))
        if recording is None:
            return DecidedTokens(self._run(rows.to(self._state.device, non_blocking=True), batch)[:num_seqs])
        recording.rows.copy_(rows, non_blocking=True)
        recording.graph.replay()
        return DecidedTokens(recording.output[:num_seqs])

    def _rows(self, batch: DecodeBatch, size: int) -> torch.Tensor:
        """[3, size] int64 on the host. Padding reads what the first sequence reads, and writes where nobody looks."""
        padding = size - len(batch.slots)
        columns = [
            batch.slots + batch.slots[:1] * padding,
            batch.slots + [self._state.scratch_row] * padding,
            batch.wanted_drafts + batch.wanted_drafts[:1] * padding,
        ]
        return on_host(columns, device=self._state.device)

    def _run(self, rows: torch.Tensor, batch: DecodeBatch) -> torch.Tensor:
        return self._step.run(DecodeRows(*rows.unbind()), batch.num_drafts, is_greedy=batch.is_greedy)

    def rehearse(self, num_seqs: int, num_drafts: int, *, is_greedy: bool) -> None:
        """Run a step of padding alone."""
        batch = self._of_padding(num_seqs, num_drafts, is_greedy=is_greedy)
        self._state.forget_padding()
        self._run(self._rows(batch, num_seqs).to(self._state.device), batch)

    def _of_padding(self, num_seqs: int, num_drafts: int, *, is_greedy: bool) -> DecodeBatch:
        slots = [self._state.scratch_row] * num_seqs
        return DecodeBatch(slots, [num_drafts] * num_seqs, num_drafts, is_greedy, [])

    def record(self, max_seqs: int, draft_counts: Iterable[int], *, show: bool) -> None:
        """Record the step for every padded number of sequences, number of drafts, and way of choosing tokens.

        Recordings share their memory, so the largest come first. show: how far it is
        """
        started = time.monotonic()
        device = self._state.device
        free = torch.cuda.mem_get_info(device)[0]
        sizes = padded_sizes(max_seqs)
        kinds = [
            (size, num_drafts, is_greedy)
            for size in reversed(sizes)
            for num_drafts in sorted(draft_counts, reverse=True)
            for is_greedy in (False, True)
        ]
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        console = Console(stderr=True)
        graphs: list[torch.cuda.CUDAGraph] = []
        try:
            for size, num_drafts, is_greedy in track(kinds, "recording CUDA graphs", console=console, disable=not show):
                batch = self._of_padding(size, num_drafts, is_greedy=is_greedy)
                rows = self._rows(batch, size).to(device)
                with torch.cuda.stream(stream):
                    self._state.forget_padding()
                    self._run(rows, batch)  # compiles kernels, and lets libraries make what graphs cannot hold
                graphs.append(graph := torch.cuda.CUDAGraph())
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = self._run(rows, batch)
                self._recordings[size, num_drafts, is_greedy] = _Recording(graph, rows, output)
        except BaseException:
            self._recordings.clear()
            for graph in graphs:  # whoever looks at the error still holds them
                graph.reset()
            raise
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._sizes = sizes
        taken = free - torch.cuda.mem_get_info(device)[0]
        seconds = time.monotonic() - started
        logger.info("recorded %d CUDA graphs in %.1f s, %.2f GiB", len(kinds), seconds, taken / 2**30)

    def forget(self, *, is_waited_for: bool = True) -> None:
        """Give the recordings back. A group of ranks cannot end while recordings hold its operations.

        is_waited_for: a step under way, which never ends if another rank is lost
        """
        try:
            if self._recordings and is_waited_for:
                torch.cuda.synchronize(self._state.device)
        finally:
            for recording in self._recordings.values():
                recording.graph.reset()
            self._recordings.clear()
            self._sizes = ()


def padded_sizes(max_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences that are recorded, up to max_seqs: two to an octave, so that a half is padding at most."""
    sizes = {size for octave in range(max_seqs.bit_length()) for size in (1 << octave, 3 << octave >> 1)}
    return (*sorted(size for size in sizes if size < max_seqs), max_seqs)
