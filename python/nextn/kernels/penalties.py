"""Repetition, presence and frequency penalties, logit bias, tokens that may not end a request yet, and grammars' masks.

Floor: one read and write of the row; only rows of requests that ask for it are touched. On a GPU what requests ask for
is kept in tensors by slot, so that a step needs nothing from the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from nextn.kernels import gpu
from nextn.kernels.gpu import jit, tl, wait_for_predecessor

PART = 8192
"""Tokens of a row that one program works on."""
CHUNK = 1024
"""How many of them at a time."""
NOTHING = -1
"""Fills lists of token ids that are shorter than their memory, and stands for the slot of a padded sequence."""


@dataclass(frozen=True)
class LogitRules:
    """What the requests ask of their logits, by slot.

    penalties: [num_slots, 3] float32: repetition (1: off), presence (0: off), frequency (0: off)
    prompt_seen: [num_slots, V] uint8, not zero where the token stands in the prompt
    output_counts: [num_slots, V] int32, how often the token stands in the output; both mean nothing without penalties
    bias_ids: [num_slots, B] int64, distinct, then NOTHING; bias_values: [num_slots, B] float32
    stop_ids: [num_slots, P] int64, then NOTHING; min_length: [num_slots] int64, tokens of prompt and output that there
        must be before one of stop_ids may be chosen
    allowed: [num_slots, ⌈V / 32⌉] int32; token t may come next if bit t % 32 of word t // 32 is set
    is_masked: [num_slots] int32; where it is 0, all tokens may
    """

    penalties: torch.Tensor
    prompt_seen: torch.Tensor
    output_counts: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    stop_ids: torch.Tensor
    min_length: torch.Tensor
    allowed: torch.Tensor
    is_masked: torch.Tensor

    @classmethod
    def for_slots(
        cls, num_slots: int, vocab_size: int, *, max_bias: int, max_stop_ids: int, device: torch.device
    ) -> LogitRules:
        """Rules that ask for nothing."""

        def filled(columns: tuple[int, ...], value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_slots, *columns), value, dtype=dtype, device=device)

        return cls(
            penalties=torch.tensor([1.0, 0.0, 0.0], device=device).repeat(num_slots, 1),
            prompt_seen=filled((vocab_size,), 0, torch.uint8),
            output_counts=filled((vocab_size,), 0, torch.int32),
            bias_ids=filled((max(max_bias, 1),), NOTHING, torch.int64),
            bias_values=filled((max(max_bias, 1),), 0.0, torch.float32),
            stop_ids=filled((max(max_stop_ids, 1),), NOTHING, torch.int64),
            min_length=filled((), 0, torch.int64),
            allowed=filled((-(-vocab_size // 32),), 0, torch.int32),
            is_masked=filled((), 0, torch.int32),
        )

    def assign(
        self,
        slot: int,
        prompt_tokens: Sequence[int],
        output_tokens: Sequence[int],
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop_ids: Collection[int] = (),
        min_new_tokens: int = 0,
    ) -> None:
        """Give a slot to a request, with the tokens it has now.

        Raises ValueError if there are more biases or stop ids than there is memory for.
        """
        bias = logit_bias or {}
        for name, found, memory in (("biases", bias, self.bias_ids), ("stop ids", stop_ids, self.stop_ids)):
            if len(found) > memory.shape[1]:
                raise ValueError(f"slot {slot}: {len(found)} {name}; there is memory for {memory.shape[1]}")
        device = self.penalties.device
        self.penalties[slot] = torch.tensor([repetition, presence, frequency], device=device)
        _fill(self.bias_ids[slot], list(bias))
        _fill(self.bias_values[slot], list(bias.values()))
        _fill(self.stop_ids[slot], sorted(stop_ids))
        self.min_length[slot] = len(prompt_tokens) + min_new_tokens if min_new_tokens else 0
        if (repetition, presence, frequency) != (1.0, 0.0, 0.0):
            prompt, output = (torch.tensor(list(ids), dtype=torch.int64) for ids in (prompt_tokens, output_tokens))
            self.prompt_seen[slot] = 0
            self.prompt_seen[slot].index_fill_(0, prompt.to(device), 1)
            self.output_counts[slot] = torch.bincount(output, minlength=self.output_counts.shape[1]).to(device)

    def mask(self, slots: torch.Tensor, allowed: torch.Tensor) -> None:
        """Allow the slots' sequences these tokens next, after no draft; what follows drafts is not masked.

        slots: [n] int64, distinct; allowed: [n, ⌈V / 32⌉] int32
        """
        self.allowed.index_copy_(0, slots, allowed)
        self.is_masked.index_fill_(0, slots, 1)

    def unmask(self, slots: torch.Tensor) -> None:
        """Allow the slots' sequences all tokens. slots: [n] int64"""
        self.is_masked.index_fill_(0, slots, 0)


def apply_penalties(
    logits: torch.Tensor,
    in_prompt: torch.Tensor,
    output_counts: torch.Tensor,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> torch.Tensor:
    """Penalise tokens that stand in a sequence's context already.

    repetition (Keskar et al., 2019): a seen token's logit is divided by it if positive, multiplied if negative;
        prompt and output count. presence and frequency (OpenAI): subtracted once, and once per occurrence, output only.
    logits: [n, V] float32, rows of one sequence
    in_prompt: [V] bool, read only by repetition
    output_counts: [n, V] int32, how often each token stands in the output before the row
    Returns [n, V] float32.
    """
    if repetition != 1.0:
        seen = (output_counts > 0) | in_prompt
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    if frequency:
        logits = logits - frequency * output_counts
    if presence:
        logits = logits - presence * (output_counts > 0)
    return logits


def adjust_logits_by_slot(
    logits: torch.Tensor,
    rules: LogitRules,
    slots: torch.Tensor,
    positions: torch.Tensor,
    draft_tokens: torch.Tensor,
    *,
    num_before: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply each row's penalties, logit bias and least length, exactly as they hold after the drafts before it.

    A slot's mask holds for the row that follows no draft.

    logits: [S · n, V] float32 or bfloat16: n rows per sequence, of which row j follows num_before + j drafts
    slots: [S] int64 or int32, NOTHING for a padded sequence, whose rows are left as they are
    positions: [S] int64, of the token that follows no draft: how many tokens the sequence has
    draft_tokens: [S, at least num_before + n - 1] int64; those of a row count as output
    out: [S · n, V] float32, contiguous, for the result; made where not given. ``logits`` itself is changed in place,
        and then rows that ask for nothing are not even read.
    Returns [S · n, V] float32.
    Raises ValueError if the rows do not fit the sequences and the drafts.
    """
    num_rows, vocab_size = logits.shape
    num_seqs = slots.shape[0]
    rows_per_seq = num_rows // max(num_seqs, 1)
    if rows_per_seq * num_seqs != num_rows:
        raise ValueError(f"{num_rows} rows cannot be shared evenly by {num_seqs} sequences")
    num_drafts = num_before + max(rows_per_seq - 1, 0)
    if draft_tokens.shape[1] < num_drafts:
        raise ValueError(f"the last row follows {num_drafts} drafts, found {draft_tokens.shape[1]}")
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if not gpu.suits(logits, slots, positions, draft_tokens, out):
        return out.copy_(_adjusted(logits.float(), rules, slots, positions, draft_tokens, num_before))
    if num_rows:
        logits = logits if out is logits else logits.contiguous()
        draft_tokens = draft_tokens if draft_tokens.stride(1) == 1 else draft_tokens.contiguous()
        gpu.launch(
            _adjust_rows,
            (num_rows, gpu.cdiv(vocab_size, PART)),
            logits,
            out,
            slots,
            positions,
            draft_tokens,
            rules.penalties,
            rules.prompt_seen,
            rules.output_counts,
            rules.bias_ids,
            rules.bias_values,
            rules.stop_ids,
            rules.min_length,
            rules.allowed,
            rules.is_masked,
            vocab_size,
            rows_per_seq,
            num_before,
            draft_tokens.stride(0),
            rules.bias_ids.shape[1],
            rules.stop_ids.shape[1],
            NUM_DRAFTS=num_drafts,
            COPIES=out is not logits,
            BIASES=gpu.next_power_of_2(rules.bias_ids.shape[1]),
            STOPS=gpu.next_power_of_2(rules.stop_ids.shape[1]),
            CHUNK=CHUNK,
            BLOCK=PART,
        )
    return out


def count_tokens(output_counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count decided tokens as output, in place.

    output_counts: [num_slots, V] int32
    slots: [S] int64 or int32; tokens: [S, n] int64; NOTHING in either is left out
    """
    num_seqs, width = tokens.shape
    if gpu.suits(output_counts, slots, tokens):
        if num_seqs and width:
            gpu.launch(
                _count_tokens,
                (gpu.cdiv(num_seqs * width, 128),),
                output_counts,
                slots,
                tokens.contiguous(),
                num_seqs * width,
                width,
                output_counts.shape[1],
                BLOCK=128,
            )
        return
    exists = (tokens >= 0) & (slots[:, None] >= 0)
    index = (slots.clamp(min=0)[:, None] * output_counts.shape[1] + tokens).where(exists, 0)
    output_counts.view(-1).index_add_(0, index.flatten(), exists.flatten().to(torch.int32))


def _fill(row: torch.Tensor, values: list[float] | list[int]) -> None:
    """The values, then NOTHING."""
    row.copy_(torch.tensor(values + [NOTHING] * (row.shape[0] - len(values)), dtype=row.dtype))


def _adjusted(
    logits: torch.Tensor,
    rules: LogitRules,
    slots: torch.Tensor,
    positions: torch.Tensor,
    draft_tokens: torch.Tensor,
    num_before: int,
) -> torch.Tensor:
    num_seqs, vocab_size = slots.shape[0], logits.shape[1]
    if not num_seqs:
        return logits
    each = logits.view(num_seqs, -1, vocab_size)
    at = slots.clamp(min=0).long()
    known = (slots >= 0)[:, None]
    rows = []
    for j in range(each.shape[1]):
        row, drafts = each[:, j], draft_tokens[:, : num_before + j]
        counts = rules.output_counts[at].scatter_add(1, drafts.clamp(min=0), (drafts >= 0).to(torch.int32))
        repetition, presence, frequency = rules.penalties[at].split(1, dim=1)
        seen = (counts > 0) | (rules.prompt_seen[at] > 0)
        changed = torch.where(seen, torch.where(row > 0, row / repetition, row * repetition), row)
        changed = changed - frequency * counts - presence * (counts > 0)
        ids, values = rules.bias_ids[at], rules.bias_values[at]
        changed = changed.scatter_add(1, ids.clamp(min=0), torch.where(ids >= 0, values, 0.0))
        stops = rules.stop_ids[at]
        too_short = (positions + num_before + j < rules.min_length[at])[:, None] & (stops >= 0)
        banned = torch.zeros(changed.shape, dtype=torch.int32, device=logits.device)
        banned.scatter_add_(1, stops.clamp(min=0), too_short.to(torch.int32))
        if num_before + j == 0:
            bits = (rules.allowed[at][:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
            banned += (bits.flatten(1)[:, :vocab_size] == 0) & (rules.is_masked[at] > 0)[:, None]
        rows.append(torch.where(known, changed.masked_fill(banned > 0, float("-inf")), row))
    return torch.stack(rows, dim=1).view(-1, vocab_size)


@jit(varying=("slots", "positions", "draft_tokens", "rows_per_seq", "num_before", "draft_stride"))
def _adjust_rows(  # type: ignore[no-untyped-def]
    logits,
    out,
    slots,
    positions,
    draft_tokens,
    penalties,
    prompt_seen,
    output_counts,
    bias_ids,
    bias_values,
    stop_ids,
    min_length,
    allowed,
    is_masked,
    vocab_size,
    rows_per_seq,
    num_before,
    draft_stride,
    num_biases,
    num_stops,
    NUM_DRAFTS: tl.constexpr,
    COPIES: tl.constexpr,
    BIASES: tl.constexpr,
    STOPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per row and part of the vocabulary."""
    wait_for_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64)
    seq = row // rows_per_seq
    num_drafts = (row % rows_per_seq).to(tl.int32) + num_before
    first = tl.program_id(1) * BLOCK
    end = tl.minimum(first + BLOCK, vocab_size)
    slot = tl.load(slots + seq).to(tl.int64)
    known = slot >= 0
    slot = tl.maximum(slot, 0)
    repetition = tl.load(penalties + slot * 3)
    presence = tl.load(penalties + slot * 3 + 1)
    frequency = tl.load(penalties + slot * 3 + 2)
    penalised = known & ((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0))
    out += row * vocab_size
    if COPIES or penalised:
        for start in range(first, end, CHUNK):
            offsets = start + tl.arange(0, CHUNK)
            mask = offsets < end
            x = tl.load(logits + row * vocab_size + offsets, mask=mask, other=0.0).to(tl.float32)
            if penalised:
                counts = tl.load(output_counts + slot * vocab_size + offsets, mask=mask, other=0)
                for j in tl.static_range(NUM_DRAFTS):
                    draft = tl.load(draft_tokens + seq * draft_stride + j)
                    counts += ((offsets == draft) & (j < num_drafts)).to(tl.int32)
                in_prompt = tl.load(prompt_seen + slot * vocab_size + offsets, mask=mask, other=0) != 0
                divided = tl.math.div_rn(x, tl.zeros((CHUNK,), tl.float32) + repetition)
                x = tl.where((counts > 0) | in_prompt, tl.where(x > 0, divided, x * repetition), x)
                x = x - frequency * counts.to(tl.float32) - tl.where(counts > 0, presence, 0.0)
            tl.store(out + offsets, x, mask=mask)
    # What follows changes few tokens, which other threads of the program may have written.
    if known & (tl.load(bias_ids + slot * num_biases) >= 0):
        tl.debug_barrier()
        index = tl.arange(0, BIASES)
        token = tl.load(bias_ids + slot * num_biases + index, mask=index < num_biases, other=-1)
        bias = tl.load(bias_values + slot * num_biases + index, mask=index < num_biases, other=0.0)
        inside = (token >= first) & (token < end)
        tl.store(out + token, tl.load(out + token, mask=inside, other=0.0) + bias, mask=inside)
    too_short = tl.load(positions + seq) + num_drafts < tl.load(min_length + slot)
    if known & too_short & (tl.load(stop_ids + slot * num_stops) >= 0):
        tl.debug_barrier()
        index = tl.arange(0, STOPS)
        token = tl.load(stop_ids + slot * num_stops + index, mask=index < num_stops, other=-1)
        inside = (token >= first) & (token < end)
        tl.store(out + token, tl.full((STOPS,), float("-inf"), tl.float32), mask=inside)
    if known & (num_drafts == 0) & (tl.load(is_masked + slot) != 0):
        tl.debug_barrier()
        words = allowed + slot * ((vocab_size + 31) // 32)
        for start in range(first, end, CHUNK):
            offsets = start + tl.arange(0, CHUNK)
            word = tl.load(words + offsets // 32, mask=offsets < end, other=-1)
            forbidden = (offsets < end) & (((word >> (offsets % 32)) & 1) == 0)
            tl.store(out + offsets, tl.full((CHUNK,), float("-inf"), tl.float32), mask=forbidden)


@jit(varying=("slots", "tokens", "n", "width"))
def _count_tokens(output_counts, slots, tokens, n, width, vocab_size, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_predecessor(EARLY)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    slot = tl.load(slots + offsets // width, mask=mask, other=-1).to(tl.int64)
    token = tl.load(tokens + offsets, mask=mask, other=-1)
    tl.atomic_add(output_counts + slot * vocab_size + token, 1, mask=mask & (slot >= 0) & (token >= 0))
