"""From the sampling fields of a request to what the engine and the text side need, with every limit checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from nextn.errors import CheckpointError
from nextn.protocol.messages import EngineReady
from nextn.protocol.sampling import TokenSampling
from nextn.server.errors import ApiError, invalid
from nextn.server.requests import SamplingFields

MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
SEED_MASK = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What applies when a request does not say: OpenAI's defaults, or the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def from_checkpoint(cls, model_path: str) -> SamplingDefaults:
        """Take temperature, top_p and top_k from ``generation_config.json`` where it has them."""
        path = Path(model_path) / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            given = json.loads(path.read_text())
            found = cls(
                temperature=float(_first(given.get("temperature"), 1.0)),
                top_p=float(_first(given.get("top_p"), 1.0)),
                top_k=max(int(_first(given.get("top_k"), 0)), 0),
            )
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); correct it or remove it") from None
        if not (0 <= found.temperature < math.inf and 0 < found.top_p <= 1):
            raise CheckpointError(
                f"{path}: found temperature {found.temperature:g} and top_p {found.top_p:g}, expected a temperature of "
                "0 or more and a top_p above 0, at most 1; correct it or remove it"
            )
        return found


def _first(*values: float | None) -> float:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def token_sampling(
    fields: SamplingFields,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    seed: int,
    has_own_seed: bool,
    defaults: SamplingDefaults,
    vocab_size: int,
    prefix: str = "",
) -> TokenSampling:
    """Resolve every default and check every token id.

    prefix: where the fields stand in the body, as ``sampling_params.``, for error messages
    """
    check_count(fields.stop_token_ids or (), MAX_STOP_TOKEN_IDS, f"{prefix}stop_token_ids")
    check_count(fields.logit_bias or (), MAX_LOGIT_BIAS, f"{prefix}logit_bias")
    check_token_ids(fields.stop_token_ids or (), vocab_size, f"{prefix}stop_token_ids")
    check_token_ids(fields.logit_bias or (), vocab_size, f"{prefix}logit_bias")
    return TokenSampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        seed=seed & SEED_MASK,
        has_own_seed=has_own_seed,
        temperature=_first(fields.temperature, defaults.temperature),
        top_p=_first(fields.top_p, defaults.top_p),
        top_k=max(int(_first(fields.top_k, defaults.top_k)), 0),
        min_p=fields.min_p or 0.0,
        repetition_penalty=_first(fields.repetition_penalty, 1.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=fields.logit_bias or {},
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
    )


def stop_strings(fields: SamplingFields, max_sequences: int, prefix: str = "") -> tuple[str, ...]:
    """The stop strings, checked for number and length."""
    param = f"{prefix}stop"
    stops = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    check_count(stops, max_sequences, param)
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise invalid(f"Each of '{param}' must have 1 to {MAX_STOP_LENGTH} characters.", param, "invalid_value")
    return stops


def context_limit(ready: EngineReady) -> int:
    """The most tokens, prompt and output together, that one request may have."""
    return min(ready.context_length, ready.max_total_tokens)


def fit_output(num_prompt: int, asked: int | None, default: int | None, limit: int, prompt_param: str) -> int:
    """How many tokens to generate at most after a prompt of ``num_prompt`` tokens.

    asked: what the request says; must fit into the context
    default: taken when the request says nothing, cut to what is left; None takes all that is left
    """
    if num_prompt == 0:
        raise invalid(f"'{prompt_param}' is empty; give at least one token.", prompt_param, "invalid_value")
    room = limit - num_prompt
    if asked is None:
        if room < 1:
            raise over_context(f"The prompt has {num_prompt} tokens", limit, prompt_param)
        return room if default is None else min(default, room)
    if max(asked, 1) > room:
        message = f"The prompt has {num_prompt} tokens and {asked} more were asked for"
        raise over_context(message, limit, prompt_param)
    return asked


def check_token_ids(token_ids: object, vocab_size: int, param: str) -> None:
    """Refuse ids that the model does not have."""
    largest = max(token_ids, default=0)  # type: ignore[call-overload]
    if largest >= vocab_size:
        message = f"'{param}' has token id {largest}, but the vocabulary ends at {vocab_size - 1}."
        raise invalid(message, param, "invalid_value")


def check_count(items: object, most: int, param: str) -> None:
    count = len(items)  # type: ignore[arg-type]
    if count > most:
        raise invalid(f"'{param}' has {count} entries; at most {most} are accepted.", param, "invalid_value")


def over_context(found: str, limit: int, param: str) -> ApiError:
    """400: what was found and asked for does not fit into the context."""
    return invalid(f"{found}, but the context is limited to {limit} tokens.", param, "context_length_exceeded")
