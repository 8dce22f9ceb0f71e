"""Sampling parameters as the engine understands them: numbers and token ids, no text."""

from __future__ import annotations

import msgspec


class TokenSampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens for one request.

    Everything here is resolved: a seed is always present, text stops stay with the text side, and ``max_new_tokens``
    already fits the context. The order of application is that of the OpenAI and Hugging Face definitions:
    penalties and ``logit_bias`` on the logits, then temperature, top-k, top-p, min-p, then a draw.

    temperature: 0 is greedy
    top_k: 0 keeps all tokens
    stop_token_ids: end the request like an eos token, once ``min_new_tokens`` were generated
    repetition_penalty: > 1 discourages tokens of prompt and output (Keskar et al., 2019)
    presence_penalty, frequency_penalty: OpenAI's, over the output only
    seed: keys the counter-based random numbers, together with the position
    has_own_seed: the seed is the client's, so that the same request must give the same tokens again
    """

    max_new_tokens: int
    seed: int
    has_own_seed: bool = True
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_rules(self) -> bool:
        """Whether logits are changed before anything is chosen from them."""
        return bool(self.has_penalties or self.logit_bias or self.min_new_tokens)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
