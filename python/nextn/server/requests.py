"""What clients may send, field by field. Decoding is strict: a field that is not here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveInt = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = list[TokenId]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Rid = Annotated[str, Meta(min_length=1, max_length=256)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    pass


class SamplingFields(_Strict, kw_only=True, frozen=True):
    """How to choose tokens and when to stop, as every generating endpoint takes it. None means: the default.

    top_k: -1 or 0 keeps all tokens
    no_stop_trim, include_stop_str_in_output: two names for leaving the stop string in the text
    """

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None


class StreamOptions(_Strict, kw_only=True, frozen=True):
    include_usage: bool | None = None


class _OpenAIRequest(SamplingFields, kw_only=True, frozen=True):
    """Fields that chat and text completions share.

    return_spec_steps: the answer says per step how many tokens were drafted, accepted and emitted
    user, metadata, store: taken and not used; they carry no meaning for a server that keeps nothing
    """

    model: str | None = None
    n: PositiveInt | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NonNegativeInt | None = None
    min_tokens: NonNegativeInt | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    rid: Rid | None = None
    return_spec_steps: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


class CompletionRequest(_OpenAIRequest, kw_only=True, frozen=True):
    """``POST /v1/completions``. The prompt is a text, token ids, or a list of either."""

    prompt: str | list[str | TokenId | TokenIds]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: PositiveInt | None = None
    suffix: str | None = None


class ContentPart(_Strict, kw_only=True, frozen=True):
    """A piece of a message. Only ``text`` is served; the rest is known so that the refusal can name the type."""

    type: str
    text: str | None = None
    image_url: Any = None
    video_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: str | None = None


class FunctionCall(_Strict, kw_only=True, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    arguments: str | dict[str, Any] = "{}"


class ToolCall(_Strict, kw_only=True, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(_Strict, kw_only=True, frozen=True):
    """One message. The fields after ``tool_call_id`` are what clients send back from earlier answers, unused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ResponseFormat(msgspec.Struct, kw_only=True, frozen=True):
    """Only ``{"type": "text"}`` is served."""

    type: str


class ChatTemplateOptions(_Strict, kw_only=True, frozen=True):
    enable_thinking: bool | None = None


class NamedTool(_Strict, kw_only=True, frozen=True):
    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(_OpenAIRequest, kw_only=True, frozen=True):
    """``POST /v1/chat/completions``.

    separate_reasoning: false leaves the reasoning, tags included, in ``content``
    """

    messages: list[Message]
    max_completion_tokens: NonNegativeInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    separate_reasoning: bool | None = None


class NativeSampling(SamplingFields, kw_only=True, frozen=True):
    """``sampling_params`` of ``/generate``."""

    max_new_tokens: NonNegativeInt | None = None
    min_new_tokens: NonNegativeInt | None = None
    n: PositiveInt | None = None
    sampling_seed: Seed | None = None


class GenerateRequest(_Strict, kw_only=True, frozen=True):
    """``POST /generate``: one prompt, or a batch of them, as text or as token ids.

    logprob_start_len: -1 returns logprobs of the output only, p ≥ 0 also of the prompt from position p on
    image_data, lora_path: known because load generators send them empty
    """

    text: str | list[str] | None = None
    input_ids: list[TokenId | TokenIds] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    rid: Rid | list[Rid] | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    top_logprobs_num: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_text_in_logprobs: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    image_data: None = None
    lora_path: None = None


class TokenizeRequest(_Strict, kw_only=True, frozen=True):
    prompt: str | list[str]
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(_Strict, kw_only=True, frozen=True):
    tokens: list[TokenId | TokenIds]
    model: str | None = None
    skip_special_tokens: bool | None = None


class AbortRequest(_Strict, kw_only=True, frozen=True):
    rid: Rid | None = None
    abort_all: bool | None = None
