"""One step of the engine: draft k tokens, verify them with the target in one forward, accept, catch up.

Plain decoding is the same step with no drafts, and a prompt chunk the same step with many known tokens. Over several
ranks, each computes the same forward passes with its part of the models, and rank 0 decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextn.distributed.parallel import SINGLE, TensorParallel
from nextn.kernels.gpu import upload
from nextn.kernels.random_uniform import ACCEPT_STREAM, DRAFT_STREAM, FINAL_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.protocol.messages import TokenLogprobs
from nextn.scheduler.scheduler import Decision, Extend
from nextn.speculative.acceptance import NO_DRAFT, verify_greedy, verify_sampled
from nextn.speculative.grammar import Grammars
from nextn.speculative.leader import Leader
from nextn.speculative.logits import LogitAdjuster, Row, probs_of_rows
from nextn.speculative.logprobs import prompt_rows, slices, token_logprobs
from nextn.speculative.proposer import ChooseTokens, Drafts, NextNProposer


class SpeculativeCycle:
    """Runs steps over the target, and over the draft where there is one.

    Keeps of a sequence only what it asks of its logits, as tensors.
    """

    def __init__(
        self,
        target: Glm4MoeForCausalLM,
        proposer: NextNProposer | None,
        kv_cache: KVCache,
        *,
        page_size: int,
        grammars: Grammars,
        tp: TensorParallel = SINGLE,
    ) -> None:
        self.leader = Leader(tp)
        self._tp = tp
        self._target = target
        self._proposer = proposer
        self._kv_cache = kv_cache
        self._page_size = page_size
        self._grammars = grammars
        self._adjuster = LogitAdjuster()
        self._device = kv_cache.k.device

    @torch.inference_mode()
    def run(self, extends: list[Extend]) -> list[Decision]:
        """Compute one step, on rank 0. Returns one decision per extend, in order."""
        self.leader.step(extends)
        chains, drafts, hidden, num_draft_computed = self._forward(extends, self._choose_drafts)
        return self._decide(extends, chains, drafts, hidden, num_draft_computed)

    @torch.inference_mode()
    def follow(self, extends: list[Extend], prompts: list[range]) -> None:
        """Compute the forward passes of a step that rank 0 runs, on any other rank.

        prompts: per extend, the rows of its new tokens that score the prompt
        """
        chains, _, hidden, _ = self._forward(extends, self._receive_drafts)
        end = 0
        for extend, chain, rows in zip(extends, chains, prompts, strict=True):
            for part in slices(rows):
                self._target.compute_logits(hidden[end + part.start : end + part.stop])
            end += extend.num_tokens + len(chain)
        if index := _deciding_rows(extends):
            self._target.compute_logits(self._rows_of(hidden, index))

    def _forward(
        self, extends: list[Extend], choose: ChooseTokens
    ) -> tuple[list[list[int]], Drafts, torch.Tensor, list[int] | None]:
        """Draft, verify, catch up: all that is computed before anything is decided.

        Returns the drafted chain of each extend (empty where none was asked for), the drafts, hidden states [T, H] of
        known tokens and drafts, and each sequence's new ``num_draft_computed``.
        """
        drafting = [extend for extend in extends if extend.num_drafts]
        drafts = Drafts([], None)
        if drafting:
            assert self._proposer is not None, "drafts are asked for only where there is a draft model"
            drafts = self._proposer.propose(drafting, choose)
        chains = self._chain_per_extend(extends, drafts)

        hidden = self._run_target(extends, chains)
        num_draft_computed: list[int] | None = None
        if self._proposer is not None:
            num_draft_computed = self._proposer.catch_up(extends)
        return chains, drafts, hidden, num_draft_computed

    @staticmethod
    def _chain_per_extend(extends: list[Extend], drafts: Drafts) -> list[list[int]]:
        chains = iter(drafts.tokens)
        return [next(chains) if extend.num_drafts else [] for extend in extends]

    def _run_target(self, extends: list[Extend], chains: list[list[int]]) -> torch.Tensor:
        """Hidden states [T, H] of known tokens and drafts; writes their KV."""
        ids: list[int] = []
        for extend, chain in zip(extends, chains, strict=True):
            ids += extend.seq.tokens[extend.start : extend.end]
            ids += chain
        batch = make_extend_batch(
            [(extend.start, extend.num_tokens + extend.num_drafts) for extend in extends],
            [extend.seq.pages for extend in extends],
            self._page_size,
            self._device,
        )
        hidden = self._target.forward(upload(ids, device=self._device), batch, self._kv_cache)
        if self._proposer is not None:
            self._proposer.store_hidden(batch.slot_mapping, hidden)
        return hidden

    def _decide(
        self,
        extends: list[Extend],
        chains: list[list[int]],
        drafts: Drafts,
        hidden: torch.Tensor,
        num_draft_computed: list[int] | None,
    ) -> list[Decision]:
        caught_up: Sequence[int | None] = num_draft_computed or [None] * len(extends)
        prompt_logprobs = self._prompt_logprobs(extends, chains, hidden)
        deciding: list[list[int]] = []
        rows: list[Row] = []
        for extend, chain in zip(extends, chains, strict=True):
            if extend.decides:
                deciding.append(chain)
                rows.extend([Row(extend.seq, chain[:j]) for j in range(len(chain) + 1)])
        if not deciding:
            return [Decision([], 0, None, known, done) for known, done in zip(prompt_logprobs, caught_up, strict=True)]
        logits = self._target.compute_logits(self._rows_of(hidden, _deciding_rows(extends)))
        verdicts = zip(*self._verify(deciding, drafts, logits, rows), strict=True)
        decisions: list[Decision] = []
        row = 0
        for extend, chain, known, done in zip(extends, chains, prompt_logprobs, caught_up, strict=True):
            if not extend.decides:
                decisions.append(Decision([], 0, None, known, done))
                continue
            accepted, final = next(verdicts)
            tokens = [*chain[:accepted], final]
            decisions.append(Decision(tokens, accepted, self._logprobs(extend, tokens, logits, row), known, done))
            row += len(chain) + 1
        return decisions

    def _rows_of(self, hidden: torch.Tensor, index: list[int]) -> torch.Tensor:
        """hidden: [T, H]; index: R rows of it, each once, in order. Returns [R, H]."""
        return hidden if len(index) == len(hidden) else hidden.index_select(0, upload(index, device=self._device))

    def _verify(
        self, chains: list[list[int]], drafts: Drafts, logits: torch.Tensor, rows: list[Row]
    ) -> tuple[list[int], list[int]]:
        """Accept a prefix of each chain and choose the token after it.

        logits: [R, V] float32; rows: R, len(chain) + 1 per chain
        Returns per chain the number of accepted drafts and the token that follows.
        """
        logits = self._adjuster.adjust(logits, rows, self._grammars.allowed(rows))
        if all(row.sampling.is_greedy for row in rows):
            return verify_greedy(logits.argmax(-1).tolist(), chains)
        num_drafts = max(len(chain) for chain in chains)
        draft_tokens = upload(
            [chain + [NO_DRAFT] * (num_drafts - len(chain)) for chain in chains], dtype=torch.int64, device=self._device
        ).view(len(chains), num_drafts)
        padded = upload(_padded_rows(chains, num_drafts), device=self._device)
        target_probs = probs_of_rows(logits, rows)[padded]
        seeds = [rows[first].sampling.seed for first in padded[:, 0].tolist()]
        starts = [rows[first].position for first in padded[:, 0].tolist()]
        positions = upload(starts, device=self._device)[:, None] + torch.arange(num_drafts + 1, device=self._device)
        seed_tensor = upload(seeds, dtype=torch.int64, device=self._device)
        num_accepted, final = verify_sampled(
            target_probs,
            self._draft_probs(chains, drafts, target_probs),
            draft_tokens,
            random_uniform(seed_tensor, positions[:, :num_drafts], ACCEPT_STREAM),
            random_uniform(seed_tensor, positions, FINAL_STREAM),
        )
        return num_accepted.tolist(), final.tolist()

    @staticmethod
    def _draft_probs(chains: list[list[int]], drafts: Drafts, target_probs: torch.Tensor) -> torch.Tensor:
        """[n, k, V]: the drafts' distributions, in the order of all deciding chains.

        A greedy request's may be zero: its target row is one-hot, so a draft is kept exactly if it is that token.
        """
        probs = target_probs.new_zeros(len(chains), target_probs.shape[1] - 1, target_probs.shape[2])
        if drafts.probs is not None:
            probs[[i for i, chain in enumerate(chains) if chain]] = drafts.probs
        return probs

    def _choose_drafts(self, logits: torch.Tensor, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, probs = self._sample_drafts(logits, rows)
        return self._tp.broadcast(tokens), probs

    def _receive_drafts(self, logits: torch.Tensor, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What rank 0 chose. Only the number of rows matters."""
        return self._tp.broadcast(torch.empty(len(rows), dtype=torch.int64, device=self._device)), None

    def _sample_drafts(self, logits: torch.Tensor, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self._adjuster.adjust(logits, rows, self._grammars.allowed(rows))
        if all(row.sampling.is_greedy for row in rows):
            return logits.argmax(-1), None
        probs = probs_of_rows(logits, rows)
        seeds = upload([row.sampling.seed for row in rows], dtype=torch.int64, device=self._device)
        positions = upload([row.position for row in rows], device=self._device)
        return sample_tokens(probs, random_uniform(seeds, positions, DRAFT_STREAM)), probs

    @staticmethod
    def _logprobs(extend: Extend, tokens: list[int], logits: torch.Tensor, row: int) -> list[TokenLogprobs] | None:
        """Of the tokens decided, the first by logits[row], if the request asks."""
        num_top = extend.seq.request.num_top_logprobs
        return None if num_top is None else token_logprobs(logits[row : row + len(tokens)], tokens, num_top)

    def _prompt_logprobs(
        self, extends: list[Extend], chains: list[list[int]], hidden: torch.Tensor
    ) -> list[list[TokenLogprobs] | None]:
        """Logprobs of prompt tokens that the extend's rows predict, for requests that want them."""
        found: list[list[TokenLogprobs] | None] = []
        row = 0
        for extend, chain in zip(extends, chains, strict=True):
            seq, wanted_from = extend.seq, extend.seq.request.prompt_logprobs_start
            if wanted_from is None or wanted_from + len(seq.prompt_logprobs or ()) >= seq.num_prompt:
                found.append(None)
            else:
                found.append(self._prompt_logprobs_of(extend, hidden[row : row + extend.num_tokens]))
            row += extend.num_tokens + len(chain)
        return found

    def _prompt_logprobs_of(self, extend: Extend, hidden: torch.Tensor) -> list[TokenLogprobs]:
        seq = extend.seq
        known: list[TokenLogprobs] = []
        if seq.request.prompt_logprobs_start == 0 and not seq.prompt_logprobs:
            known.append(TokenLogprobs(seq.tokens[0], None))
        for rows in slices(prompt_rows(extend)):
            logits = self._target.compute_logits(hidden[rows.start : rows.stop])
            tokens = seq.tokens[extend.start + rows.start + 1 : extend.start + rows.stop + 1]
            known += token_logprobs(logits, tokens, seq.request.num_top_logprobs or 0)
        return known


def _deciding_rows(extends: list[Extend]) -> list[int]:
    """Among the rows of all known tokens and drafts, those that choose new tokens."""
    index: list[int] = []
    end = 0
    for extend in extends:
        end += extend.num_tokens + extend.num_drafts
        if extend.decides:
            index.extend(range(end - 1 - extend.num_drafts, end))
    return index


def _padded_rows(chains: list[list[int]], num_drafts: int) -> list[list[int]]:
    """Row indices [n, num_drafts + 1]: each chain's rows, the last repeated to the common width."""
    index, first = [], 0
    for chain in chains:
        index.append([first + min(j, len(chain)) for j in range(num_drafts + 1)])
        first += len(chain) + 1
    return index
