"""Every rank but the first: the forward passes that rank 0 says, and no decision.

A follower mirrors the tokens and pages of the sequences that run, and is sent only what changes.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from nextn.distributed.parallel import TensorParallel
from nextn.kernels.gpu import upload
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.protocol.messages import AddRequest
from nextn.protocol.ranks import DecodeBatch, ExtendPart, Finish, ScorePart, StepPart, StillHere, ToRanks
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.scheduler import Extend
from nextn.scheduler.sequence import Sequence
from nextn.speculative.cycle import SpeculativeCycle


class Follower:
    """Owns the mirrored sequences.

    decode: starts a decode step on the device
    """

    def __init__(
        self,
        tp: TensorParallel,
        cycle: SpeculativeCycle,
        decode: Callable[[DecodeBatch], object],
        target: Glm4MoeForCausalLM,
        kv_cache: KVCache,
    ) -> None:
        self._tp = tp
        self._cycle = cycle
        self._decode = decode
        self._target = target
        self._kv_cache = kv_cache
        self._decoder = msgspec.msgpack.Decoder(ToRanks)
        self._sequences: dict[int, Sequence] = {}

    def run(self) -> None:
        """Compute what rank 0 says until it says that this is the end. Raises PeerLost if it is gone."""
        while True:
            match self._decoder.decode(self._tp.receive()):
                case StepPart(extends, gone):
                    for seq_id in gone:
                        del self._sequences[seq_id]
                    rows = [range(*part.prompt_rows) if part.prompt_rows else range(0) for part in extends]
                    self._cycle.follow([self._extend(part) for part in extends], rows)
                case DecodeBatch() as batch:
                    self._decode(batch)
                case ScorePart() as part:
                    self._score(part)
                case StillHere():
                    pass
                case Finish():
                    return

    def _extend(self, part: ExtendPart) -> Extend:
        seq = self._sequences.get(part.seq_id)
        if seq is None:
            seq = self._sequences[part.seq_id] = _mirror(part.seq_id)
        seq.tokens += part.new_tokens
        seq.pages[part.num_pages_kept :] = part.new_pages
        seq.num_draft_computed = part.num_draft_computed
        return Extend(seq, part.start, part.num_tokens, part.num_drafts, part.decides, part.wants_drafts)

    @torch.inference_mode()
    def _score(self, part: ScorePart) -> None:
        device = self._kv_cache.k.device
        batch = make_extend_batch([(part.start, len(part.tokens))], [part.pages], self._kv_cache.page_size, device)
        hidden = self._target.forward(upload(part.tokens, device=device), batch, self._kv_cache)
        if part.first_row < len(part.tokens):
            self._target.compute_logits(hidden[part.first_row :])


def _mirror(seq_id: int) -> Sequence:
    """A sequence without tokens, of which nothing is decided here."""
    request = AddRequest(rid=str(seq_id), input_ids=[], sampling=TokenSampling(max_new_tokens=0, seed=0))
    return Sequence(request=request, arrival=seq_id, arrival_time=0.0, max_new_tokens=0, stop_ids=frozenset())
