"""What clients may send, field by field. Decoding is strict: a field that is not here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

NonNegativeInt = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = list[TokenId]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Rid = Annotated[str, Meta(min_length=1, max_length=256)]

Unread = msgspec.Raw
"""Any JSON, of which nothing is made: it may be large, and nothing needs what it says."""


def is_given(value: Unread) -> bool:
    """Whether a request has the field, with anything but null."""
    return bytes(value) not in (b"", b"null")


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True, gc=False):
    """JSON has no cycles, so that the garbage collector need not walk the many that one body may be."""


class SamplingFields(Strict, kw_only=True, frozen=True):
    """How to choose tokens and when to stop, as every generating endpoint takes it. None means: the default.

    top_k: -1 or 0 keeps all tokens
    json_schema, regex, ebnf: what the output must follow, at most one of them; a schema may come as a string of JSON
    no_stop_trim, include_stop_str_in_output: two names for leaving the stop string in the text
    spaces_between_special_tokens: of slow tokenizers; fast ones, such as every model's here, decode alike either way
    """

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None


class StreamOptions(Strict, kw_only=True, frozen=True):
    """continuous_usage_stats: every chunk says the usage so far"""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class OpenAIRequest(SamplingFields, kw_only=True, frozen=True):
    """Fields that chat and text completions share.

    return_spec_steps: the answer says per step how many tokens were drafted, accepted and emitted
    user, metadata, safety_identifier, prompt_cache_key: labels, which ask for nothing that changes an answer
    return_hidden_states: one of ``neutral.NEUTRAL``
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
    return_hidden_states: bool | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    service_tier: str | None = None


class CompletionRequest(OpenAIRequest, kw_only=True, frozen=True):
    """``POST /v1/completions``. The prompt is a text, token ids, or a list of either."""

    prompt: str | list[str | TokenId | TokenIds]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: PositiveInt | None = None
    suffix: str | None = None


class CacheControl(Strict, kw_only=True, frozen=True):
    """Asks that the prompt up to here be cached, as every prompt is: for as long as there is room, whatever ``ttl``."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class ContentPart(Strict, kw_only=True, frozen=True):
    """A piece of a message. Only ``text`` is served; the rest is known so that the refusal can name the type."""

    type: str
    text: str | None = None
    cache_control: CacheControl | None = None
    image_url: Unread = msgspec.field(default_factory=Unread)
    video_url: Unread = msgspec.field(default_factory=Unread)
    input_audio: Unread = msgspec.field(default_factory=Unread)
    file: Unread = msgspec.field(default_factory=Unread)
    refusal: str | None = None


class FunctionCall(Strict, kw_only=True, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    arguments: str | dict[str, Any] | None = None


class ToolCall(Strict, kw_only=True, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None


class Message(Strict, kw_only=True, frozen=True):
    """One message. The fields after ``name`` are what clients send back from earlier answers, unused.

    reasoning: another name for reasoning_content
    type: what lm-eval calls every message, and OpenAI's other API calls it
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    cache_control: CacheControl | None = None
    type: Literal["text", "message"] | None = None
    refusal: str | None = None
    annotations: Unread = msgspec.field(default_factory=Unread)
    audio: None = None
    function_call: None = None


class JsonSchema(Strict, kw_only=True, frozen=True):
    """strict: the schema is enforced in any case"""

    name: str
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Strict, kw_only=True, frozen=True):
    """What the answer's content is; ``json_object`` is JSON of any object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatTemplateOptions(Strict, kw_only=True, frozen=True):
    """clear_thinking: false shows the model the reasoning of all its turns, true only that since the user's last"""

    enable_thinking: bool | None = None
    clear_thinking: bool | None = None


class Thinking(Strict, kw_only=True, frozen=True):
    """What ``chat_template_kwargs`` says, as the API of GLM's makers says it."""

    type: Literal["enabled", "disabled"] | None = None
    clear_thinking: bool | None = None


class NamedFunction(Strict, kw_only=True, frozen=True):
    name: str


class NamedTool(Strict, kw_only=True, frozen=True, tag_field="type", tag="function"):
    """name: stands for ``function``, as OpenAI's other API has it"""

    function: NamedFunction | None = None
    name: str | None = None


class ToolSubset(Strict, kw_only=True, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(Strict, kw_only=True, frozen=True, tag_field="type", tag="allowed_tools"):
    """mode, tools: stand for ``allowed_tools``, as OpenAI's other API has it"""

    allowed_tools: ToolSubset | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedTool] | None = None

    @property
    def subset(self) -> ToolSubset | None:
        """The tools that may be called, however they are given; None where they are not."""
        if self.allowed_tools is not None or self.mode is None or self.tools is None:
            return self.allowed_tools
        return ToolSubset(mode=self.mode, tools=self.tools)


class ChatRequest(OpenAIRequest, kw_only=True, frozen=True):
    """``POST /v1/chat/completions``.

    separate_reasoning: false leaves the reasoning, tags included, in ``content``
    thinking, enable_thinking: other names for those of chat_template_kwargs
    reasoning_effort: GLM-4 thinks or does not: ``none`` turns thinking off, all else leaves it on
    request_id, user_id, do_sample, tool_stream: of the API of GLM's makers: rid, user, false for temperature 0, and
        true for arguments of tool calls that are streamed as they come
    continue_final_message, stream_reasoning: of ``neutral.NEUTRAL``
    audio and what follows it: known so that the refusal can say what to do instead
    """

    messages: list[Message]
    max_completion_tokens: NonNegativeInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    separate_reasoning: bool | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    modalities: list[str] | None = None
    request_id: Rid | None = None
    user_id: str | None = None
    do_sample: bool | None = None
    tool_stream: bool | None = None
    continue_final_message: bool | None = None
    stream_reasoning: bool | None = None
    audio: Unread = msgspec.field(default_factory=Unread)
    function_call: Unread = msgspec.field(default_factory=Unread)
    functions: Unread = msgspec.field(default_factory=Unread)
    prediction: Unread = msgspec.field(default_factory=Unread)
    verbosity: Unread = msgspec.field(default_factory=Unread)
    web_search_options: Unread = msgspec.field(default_factory=Unread)


class NativeSampling(SamplingFields, kw_only=True, frozen=True):
    """``sampling_params`` of ``/generate``."""

    max_new_tokens: NonNegativeInt | None = None
    min_new_tokens: NonNegativeInt | None = None
    n: PositiveInt | None = None
    sampling_seed: Seed | None = None


class GenerateRequest(Strict, kw_only=True, frozen=True):
    """``POST /generate``: one prompt, or a batch of them, as text or as token ids.

    logprob_start_len: -1 returns logprobs of the output only, p ≥ 0 also of the prompt from position p on
    image_data, lora_path and what follows them: known because load generators and routers send them with what asks for
        nothing: empty, or as in ``neutral.NEUTRAL``
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
    return_hidden_states: bool | None = None
    return_routed_experts: bool | None = None
    return_bytes: bool | None = None
    return_entropy: bool | None = None
    log_metrics: bool | None = None
    no_logs: bool | None = None
    background: bool | None = None


class TokenizeRequest(Strict, kw_only=True, frozen=True):
    """``POST /tokenize``: texts, or what a chat request with these messages makes of them.

    add_special_tokens: of texts; a chat template writes its own
    tools, chat_template_kwargs: of messages
    """

    prompt: str | list[str] | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Strict, kw_only=True, frozen=True):
    tokens: list[TokenId | TokenIds]
    model: str | None = None
    skip_special_tokens: bool | None = None


class AbortRequest(Strict, kw_only=True, frozen=True):
    rid: Rid | None = None
    abort_all: bool | None = None
