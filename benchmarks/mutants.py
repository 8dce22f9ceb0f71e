"""Faults of NextN drafts: patches of this process, and spoilt files. The package knows of none and can switch on none.

A patch replaces functions of the package before an engine is made. It is for a process that ends with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nextn.checkpoint import loader
from nextn.checkpoint.layout import ExpectedTensor, Layout
from nextn.checkpoint.plan import DraftPlan
from nextn.demo import checkpoint_dir
from nextn.distributed.parallel import TensorParallel
from nextn.layers.storage import WHOLE, Part
from nextn.models import glm4_moe_nextn
from nextn.models.glm4_moe import Glm4MoeDecoderLayer, Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN
from nextn.scheduler.kv_pages import KVPages
from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence
from nextn.speculative import cycle, proposer
from nextn.speculative.proposer import NextNProposer
from nextn.text.tool_calls import ToolCallParser
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    apply: patches this process; for faults of the code
    spoil: changes the NextN layer's tensors; for faults of a checkpoint
    spoil_config: changes config.json's values
    """

    what: str
    apply: Callable[[], None] | None = None
    spoil: Callable[[State], None] | None = None
    spoil_config: Callable[[dict[str, Any]], None] | None = None


def spoil_files(mutant: Mutant, folder: Path) -> None:
    """Rewrite a copy of the embedded checkpoint."""
    if mutant.spoil is not None:
        state = load_file(folder / "mtp.safetensors")
        mutant.spoil(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "mtp.safetensors")
    if mutant.spoil_config is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        mutant.spoil_config(config)
        path.write_text(json.dumps(config))


# Weights


def _noise(like: torch.Tensor) -> torch.Tensor:
    return (torch.randn(like.shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def _target_head() -> torch.Tensor:
    """[V, H]; the embedding has its shape."""
    return load_file(checkpoint_dir() / "model.safetensors")["lm_head.weight"]


def _prefix(state: State) -> str:
    (name,) = [name for name in state if name.endswith("eh_proj.weight")]
    return name.removesuffix("eh_proj.weight")


def _random_head(state: State) -> None:
    state[f"{_prefix(state)}shared_head.head.weight"] = _noise(_target_head())


def _random_embedding(state: State) -> None:
    state[f"{_prefix(state)}embed_tokens.weight"] = _noise(_target_head())


def _shift_norms(state: State) -> None:
    for name in [name for name in state if "norm" in name]:
        state[name] = state[name] - 1


def _scales_of_ones(state: State) -> None:
    for name in [name for name in state if name.endswith("weight_scale")]:
        state[name] = torch.ones_like(state[name])


def _drop_scales(state: State) -> None:
    for name in [name for name in state if name.endswith("weight_scale")]:
        del state[name]


def _rename_ignored(config: dict[str, Any]) -> None:
    """As a runtime would call its modules, and no checkpoint does."""
    quantization = config["quantization_config"]
    quantization["ignore"] = [name.replace("model.layers.", "model.mtp.") for name in quantization["ignore"]]


def _shuffle_scales() -> None:
    fill, read = loader._fill, loader._read

    def shuffled(tensor: ExpectedTensor, reader: loader.TensorReader, part: Part = WHOLE) -> torch.Tensor:
        found = read(tensor, reader, part)
        return found.roll(1, 0) if tensor.role == "scale" else found

    def fill_draft(model: loader.Model, *args: Any, **options: Any) -> None:
        loader._read = shuffled if isinstance(model, Glm4MoeForCausalLMNextN) else read
        fill(model, *args, **options)

    loader._fill = fill_draft


def drop_draft_quantization() -> None:
    """The draft's constructor loses the detected config: plain linears, FP8 codes as numbers, no scale is read."""
    fill = loader._fill

    def build_draft(
        plan: DraftPlan, target: Glm4MoeForCausalLM, dtype: torch.dtype, tp: TensorParallel
    ) -> Glm4MoeForCausalLMNextN:
        return Glm4MoeForCausalLMNextN(
            plan.config,
            None,
            target=target,
            dtype=dtype,
            has_own_head=plan.has_own_head,
            has_own_embedding=plan.has_own_embedding,
            has_fp8_head=plan.has_fp8_head,
            tp=tp,
        )

    def fill_raw(model: loader.Model, index: Any, layout: Layout, seed: int, **options: Any) -> None:
        if not isinstance(model, Glm4MoeForCausalLMNextN):
            return fill(model, index, layout, seed, **options)
        with index.reader() as read:
            for name, view, _ in model.weight_slots():
                view.copy_(read(name).view(view.shape))

    loader._build_draft = build_draft
    loader._fill = fill_raw


# The layer's arithmetic


def _change_draft(change: Callable[[Glm4MoeForCausalLMNextN], None]) -> None:
    """Every draft is changed once it has been built."""
    init = Glm4MoeForCausalLMNextN.__init__

    def changed(self: Glm4MoeForCausalLMNextN, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        change(self)

    Glm4MoeForCausalLMNextN.__init__ = changed  # type: ignore[method-assign]


def _change_input(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """change: (concat [T, 2H], hidden_states [T, H]) → concat"""
    nextn_input = glm4_moe_nextn.nextn_input

    def changed(input_ids: torch.Tensor, embedding: torch.Tensor, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        return change(nextn_input(input_ids, embedding, hidden, *rest), hidden)

    glm4_moe_nextn.nextn_input = changed


def _swap_concat() -> None:
    _change_input(lambda both, _: both.roll(both.shape[1] // 2, 1))


def _skip_hnorm() -> None:
    _change_input(lambda both, hidden: torch.cat([both[:, : hidden.shape[1]], hidden], 1))


def _carry_unnormed() -> None:
    def change(draft: Glm4MoeForCausalLMNextN) -> None:
        norm = draft.norm.forward
        draft.norm.forward = lambda x: x  # type: ignore[method-assign]
        draft.compute_logits = lambda hidden: draft.head.forward(norm(hidden))  # type: ignore[method-assign]

    _change_draft(change)


def _norm_twice() -> None:
    def change(draft: Glm4MoeForCausalLMNextN) -> None:
        norm = draft.norm.forward
        draft.norm.forward = lambda x: norm(norm(x))  # type: ignore[method-assign]

    _change_draft(change)


def _drop_residual() -> None:
    def change(draft: Glm4MoeForCausalLMNextN) -> None:
        block: Glm4MoeDecoderLayer = draft.block
        moe = block.mlp.forward
        block.mlp.forward = lambda x, residual=None: moe(x, None)  # type: ignore[method-assign, assignment, misc]

    _change_draft(change)


def _reduce_twice() -> None:
    """What a second all-reduce over two ranks does to the experts' sum."""

    def change(draft: Glm4MoeForCausalLMNextN) -> None:
        moe = draft.block.mlp.forward

        def doubled(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return 2 * moe(x, None) + residual

        draft.block.mlp.forward = doubled  # type: ignore[method-assign, assignment]

    _change_draft(change)


def _rotate_twice() -> None:
    def change(draft: Glm4MoeForCausalLMNextN) -> None:
        table = draft._rotary
        draft._rotary = dataclasses.replace(table, cos=table.cos**2 - table.sin**2, sin=2 * table.sin * table.cos)

    _change_draft(change)


def _scale_attention() -> None:
    def change(draft: Glm4MoeForCausalLMNextN) -> None:
        draft.block.self_attn.scale *= 0.5

    _change_draft(change)


# Where entries stand


def _positions_off_by_one() -> None:
    make_chain_batches = proposer.make_chain_batches

    def changed(*args: Any, **kwargs: Any) -> list[proposer.ExtendBatch]:
        batches = make_chain_batches(*args, **kwargs)
        return [dataclasses.replace(batch, positions=batch.positions + 1) for batch in batches]

    proposer.make_chain_batches = changed


def _change_catch_up(change: Callable[[NextNProposer, list[Extend], list[int]], list[int]]) -> None:
    """change: (proposer, extends, each one's num_draft_computed) → the same, otherwise"""
    catch_up = NextNProposer.catch_up

    def changed(self: NextNProposer, extends: list[Extend]) -> list[int]:
        return change(self, extends, catch_up(self, extends))

    NextNProposer.catch_up = changed  # type: ignore[method-assign]


def _no_prompt_prefill() -> None:
    NextNProposer.catch_up = lambda self, extends: [extend.end for extend in extends]  # type: ignore[method-assign]


def _keep_rejected() -> None:
    """Entries of drafts that were rejected stay where those of the tokens that came instead belong."""
    propose = NextNProposer.propose

    def changed(self: NextNProposer, extends: list[Extend], choose: proposer.ChooseTokens) -> proposer.Drafts:
        size = self._page_size
        slots = [
            seq.pages[position // size] * size + position % size
            for seq, end in ((extend.seq, extend.end) for extend in extends)
            for position in range(max(seq.num_draft_computed, seq.num_prompt), end)
        ]
        caches = [cache[-1].view(-1, *cache.shape[-2:]) for cache in (self._kv_cache.k, self._kv_cache.v)]
        stale = [cache[slots].clone() for cache in caches]
        drafts = propose(self, extends, choose)
        for cache, entries in zip(caches, stale, strict=True):
            cache[slots] = entries
        return drafts

    NextNProposer.propose = changed  # type: ignore[method-assign]


def _wrong_hidden_at_chunk_start() -> None:
    """A chunk's first entry is made of its own hidden state; the one before it was computed in another step."""
    entries = NextNProposer._entries

    def changed(self: NextNProposer, spans: list[tuple[Sequence, int, int]]) -> Any:
        ids, hidden, positions, slots = entries(self, spans)
        first = list(itertools.accumulate((stop - start for _, start, stop in spans[:-1]), initial=0))
        hidden = hidden.clone()
        hidden[first] = self._hidden[slots[first]]
        return ids, hidden, positions, slots

    NextNProposer._entries = changed  # type: ignore[method-assign]


def _cached_prefix_without_draft() -> None:
    """A prefix from the cache comes without the draft's keys and values."""

    def change(self: NextNProposer, extends: list[Extend], done: list[int]) -> list[int]:
        for extend in extends:
            if extend.seq.cached_tokens and extend.start == extend.seq.cached_tokens:
                pages = extend.seq.pages[: extend.start // self._page_size]
                self._kv_cache.k[-1][pages] = 0
                self._kv_cache.v[-1][pages] = 0
        return done

    _change_catch_up(change)


def _share_hidden_states() -> None:
    """Requests write over each other's hidden states."""
    store = NextNProposer.store_hidden

    def changed(self: NextNProposer, slot_mapping: torch.Tensor, hidden: torch.Tensor) -> None:
        store(self, slot_mapping, hidden)
        store(self, slot_mapping + 1 - slot_mapping % 2, hidden)

    NextNProposer.store_hidden = changed  # type: ignore[method-assign]


def _stray_write() -> None:
    """Something overwrites the layer's norm after a while, long after the trial at start."""
    num_chains = 0

    def change(self: NextNProposer, extends: list[Extend], done: list[int]) -> list[int]:
        nonlocal num_chains
        num_chains += sum(extend.num_drafts > 0 for extend in extends)
        if num_chains > 700:
            self.draft.norm.weight.zero_()
        return done

    _change_catch_up(change)


# What follows the draft


def _accept_everything() -> None:
    def greedy(target_tokens: Any, chains: Any) -> tuple[list[int], list[int]]:
        ends = itertools.accumulate(len(chain) + 1 for chain in chains)
        return [len(chain) for chain in chains], [target_tokens[end - 1] for end in ends]

    def sampled(target_probs: torch.Tensor, _: torch.Tensor, draft_tokens: torch.Tensor, *rest: Any) -> Any:
        return (draft_tokens >= 0).sum(1), target_probs[:, -1].argmax(-1)

    cycle.verify_greedy = greedy
    cycle.verify_sampled = sampled


def _accept_one_too_many() -> None:
    verify = cycle.verify_sampled

    def sampled(target_probs: torch.Tensor, draft_probs: torch.Tensor, tokens: torch.Tensor, *rest: Any) -> Any:
        accepted, final = verify(target_probs, draft_probs, tokens, *rest)
        return (accepted + 1).minimum((tokens >= 0).sum(1)), final

    cycle.verify_sampled = sampled


def _leak_a_page() -> None:
    release = KVPages.release

    def leaking(self: KVPages, seq: Sequence) -> None:
        release(self, seq)
        if len(self._free) > 1:
            self._free.pop()

    KVPages.release = leaking  # type: ignore[method-assign]


def _one_tag_per_push() -> None:
    def push(self: ToolCallParser, text: str, finished: bool) -> Any:
        self._buffer += text
        self._advance()
        if finished:
            self._finish()
        events, self._events = self._events, []
        return events

    ToolCallParser.push = push  # type: ignore[method-assign]


MUTANTS: dict[str, Mutant] = {
    "random-head": Mutant("shared_head.head left at random values", spoil=_random_head),
    "random-embedding": Mutant("embed_tokens left at random values", spoil=_random_embedding),
    "no-hnorm": Mutant("the carried hidden state is not normed on the way in", _skip_hnorm),
    "carry-unnormed": Mutant("the head's output is carried on without its norm", _carry_unnormed),
    "norm-twice": Mutant("the head's output is normed twice", _norm_twice),
    "no-residual": Mutant("the block drops a residual", _drop_residual),
    "shifted-norms": Mutant("norm weights stored shifted by one", spoil=_shift_norms),
    "raw-fp8": Mutant("FP8 codes read as numbers, scales left out", drop_draft_quantization),
    "scales-of-ones": Mutant("the checkpoint's scales are all one", spoil=_scales_of_ones),
    "no-scales": Mutant("FP8 codes without scales in the files", spoil=_drop_scales),
    "shuffled-scales": Mutant("each channel gets its neighbour's scale", _shuffle_scales),
    "runtime-ignores": Mutant("ignore entries named as no tensor is", spoil_config=_rename_ignored),
    "swapped-concat": Mutant("the halves of eh_proj's input swapped", _swap_concat),
    "reduced-twice": Mutant("the experts' sum added twice", _reduce_twice),
    "no-prefill": Mutant("no draft KV over the prompt", _no_prompt_prefill),
    "chunk-start": Mutant("a chunk's first entry made of the wrong hidden state", _wrong_hidden_at_chunk_start),
    "cached-no-draft": Mutant("a cached prefix comes without draft KV", _cached_prefix_without_draft),
    "stale-kv": Mutant("draft KV is not rewound after a rejection", _keep_rejected),
    "accept-all": Mutant("the verify pass accepts every draft", _accept_everything),
    "accept-plus-one": Mutant("the verify pass accepts a sampled draft too many", _accept_one_too_many),
    "shared-state": Mutant("hidden states overwrite their neighbours'", _share_hidden_states),
    "stray-write": Mutant("weights overwritten while serving", _stray_write),
    "leaked-page": Mutant("each request leaks a page", _leak_a_page),
    "rope-twice": Mutant("RoPE applied twice", _rotate_twice),
    "positions-plus-one": Mutant("draft positions off by one", _positions_off_by_one),
    "attention-scale": Mutant("draft attention unlike the target's", _scale_attention),
    "one-tag": Mutant("a parser takes one tag per chunk", _one_tag_per_push),
}


def main() -> int:
    """``python -m benchmarks.mutants FAULT [pytest arguments]``: the project's tests with a fault in the code."""
    import pytest

    apply = MUTANTS[sys.argv[1]].apply
    assert apply is not None, "a fault of files is not in the code that tests test"
    apply()
    return int(pytest.main([*sys.argv[2:], "-p", "no:cacheprovider"]))


if __name__ == "__main__":
    sys.exit(main())
