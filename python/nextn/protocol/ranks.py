"""What rank 0 tells the other ranks: which forward passes come next. They compute the same ones, and decide nothing."""

from __future__ import annotations

import msgspec

from nextn.protocol.sampling import TokenSampling


class ExtendPart(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step. The other ranks keep its tokens and pages; only what is new is sent.

    seq_id: the same in every step of the sequence
    start, num_tokens, num_drafts, decides, wants_drafts: as ``Extend``
    num_draft_computed: as ``Sequence``
    new_tokens: to append; new_pages: to put after the first ``num_pages_kept``
    prompt_rows: (first, stop) of the new tokens' rows whose logits score the prompt; None if none do
    """

    seq_id: int
    start: int
    num_tokens: int
    num_drafts: int
    decides: bool
    wants_drafts: bool
    num_draft_computed: int
    new_tokens: list[int]
    num_pages_kept: int
    new_pages: list[int]
    prompt_rows: tuple[int, int] | None


class StepPart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step of the cycle. gone: sequences that have ended since the last one."""

    extends: list[ExtendPart]
    gone: list[int]


class ScorePart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A forward of the target alone over ``tokens`` from position ``start``; logits from row ``first_row`` on."""

    start: int
    tokens: list[int]
    pages: list[int]
    first_row: int


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """What stays the same of a sequence. token_limit: the most tokens it can have, prompt included."""

    sampling: TokenSampling
    num_prompt: int
    token_limit: int
    stop_ids: list[int]


class SlotPatch(msgspec.Struct, frozen=True, array_like=True):
    """What the device does not know yet of the sequence in a slot.

    tokens: those from position first_token on, up to the sequence's last; none leaves its length as it is
    pages: its pages from index first_page on
    new: where the sequence is new in the slot
    """

    slot: int
    first_token: int
    tokens: list[int]
    first_page: int
    pages: list[int]
    new: NewSequence | None = None


class DecodeBatch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step of sequences that only decode, over the state that every rank's device keeps of them by slot.

    slots: theirs; wanted_drafts: at most num_drafts each
    is_greedy: whether all of them take the likeliest tokens as the model gives them
    patches: what the device does not know yet of them
    """

    slots: list[int]
    wanted_drafts: list[int]
    num_drafts: int
    is_greedy: bool
    patches: list[SlotPatch]


class StillHere(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nothing to do, said now and then so that silence means that rank 0 is gone."""


class Finish(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end."""


ToRanks = StepPart | DecodeBatch | ScorePart | StillHere | Finish
