"""One request on the wire: native /generate, /v1/completions or /v1/chat/completions."""

import time
from typing import Any

import aiohttp
import msgspec

from nextn.bench.options import BenchOptions
from nextn.bench.types import BenchRequest, RequestResult

NATIVE = ("nextn", "sglang")


class SSEParser:
    """Turns bytes, split anywhere, into the data of complete server-sent events."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add bytes; returns the events that they completed."""
        lines = (self._buffer + chunk).split(b"\n")
        self._buffer = lines.pop()
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def close(self) -> list[bytes]:
        """An event that the stream ended without its blank line."""
        return self.feed(b"\n\n")


def make_payload(request: BenchRequest, options: BenchOptions, model: str) -> tuple[str, dict[str, Any]]:
    """The path and the JSON body of a request."""
    stream, ignore_eos = not options.disable_stream, not options.disable_ignore_eos
    extra = dict(options.extra_request_body)
    if options.backend in NATIVE:
        sampling = {"temperature": 0.0, "max_new_tokens": request.output_len, "ignore_eos": ignore_eos}
        sampling |= extra.pop("sampling_params", {})
        prompt = {"text": request.text} if request.text is not None else {"input_ids": request.input_ids}
        return "/generate", {**prompt, "sampling_params": sampling, "stream": stream, **extra}
    body: dict[str, Any] = {"model": model, "temperature": 0.0, "stream": stream}
    if ignore_eos:
        body["ignore_eos"] = True
    if stream:
        body["stream_options"] = {"include_usage": True}
    if options.backend.endswith("-chat"):
        body["max_completion_tokens"] = request.output_len
        body["messages"] = [{"role": "user", "content": request.text}]
        return "/v1/chat/completions", body | extra
    body["max_tokens"] = request.output_len
    body["prompt"] = request.text if request.text is not None else request.input_ids
    return "/v1/completions", body | extra


class _Meta(msgspec.Struct):
    """``meta_info`` of a native answer, as far as it is read here."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    spec_verify_ct: int | None = None
    finish_reason: Any = None


class _NativeEvent(msgspec.Struct):
    """An answer of /generate, or an event of its stream."""

    text: str | None = None
    meta_info: _Meta | None = None
    error: Any = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Message(msgspec.Struct):
    """A message of a chat answer, or what an event adds to it."""

    reasoning_content: str | None = None
    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None

    @property
    def whole_text(self) -> str:
        """What the model wrote, of whatever kind."""
        message = self.delta or self.message or _Message()
        parts = [self.text, message.reasoning_content or message.reasoning, message.content]
        for call in message.tool_calls or []:
            if call.function is not None:
                parts += [call.function.name, call.function.arguments]
        return "".join(part for part in parts if part)


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _OpenAIEvent(msgspec.Struct):
    """An answer of a completions endpoint, or an event of its stream."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


def _error_message(error: Any) -> str:
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)


def _take_native(event: _NativeEvent, result: RequestResult, now: float) -> None:
    meta = event.meta_info or _Meta()
    text = event.text or ""
    tokens = meta.completion_tokens
    before = result.completion_tokens or 0
    if (tokens is not None and tokens > before) or (tokens is None and text != result.text):
        result.chunk_times.append(now)
        result.chunk_texts.append(text[len(result.text) :])
        if tokens is not None:
            result.chunk_tokens.append(tokens - before)
    result.text = text or result.text
    result.completion_tokens = _newer(tokens, result.completion_tokens)
    result.prompt_tokens = _newer(meta.prompt_tokens, result.prompt_tokens)
    result.spec_verify_ct = _newer(meta.spec_verify_ct, result.spec_verify_ct)
    reason = meta.finish_reason
    if isinstance(reason, dict) and reason.get("type") == "abort":
        result.error = f"aborted: {reason.get('message') or 'no reason given'}"


def _take_openai(event: _OpenAIEvent, result: RequestResult, now: float) -> None:
    text = "".join(choice.whole_text for choice in event.choices or [])
    if text:
        result.chunk_times.append(now)
        result.chunk_texts.append(text)
    if event.usage is not None:
        result.prompt_tokens = _newer(event.usage.prompt_tokens, result.prompt_tokens)
        result.completion_tokens = _newer(event.usage.completion_tokens, result.completion_tokens)


def _newer(new: int | None, old: int | None) -> int | None:
    return old if new is None else new


def _take(data: bytes, result: RequestResult, now: float, native: bool) -> None:
    """Take in one event, or a whole answer. Raises msgspec.DecodeError or UnicodeDecodeError if it is neither."""
    event: _NativeEvent | _OpenAIEvent
    if native:
        event = msgspec.json.decode(data, type=_NativeEvent)
        _take_native(event, result, now)
    else:
        event = msgspec.json.decode(data, type=_OpenAIEvent)
        _take_openai(event, result, now)
    if event.error:
        result.error = _error_message(event.error)


async def send(
    session: aiohttp.ClientSession, url: str, request: BenchRequest, options: BenchOptions, model: str
) -> RequestResult:
    """Send one request and observe its answer. A failure is recorded in the result, never raised."""
    path, body = make_payload(request, options, model)
    payload = msgspec.json.encode(body)
    native = options.backend in NATIVE
    result = RequestResult(start=time.perf_counter(), prompt_len=request.prompt_len)
    headers = {"Content-Type": "application/json"}
    done = False
    try:
        async with session.post(url + path, data=payload, headers=headers) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {_body_message(await response.read())}"
            elif options.disable_stream:
                data = await response.read()
                _take(data, result, time.perf_counter(), native)
                result.text = result.text or "".join(result.chunk_texts)
                result.chunk_times, result.chunk_texts, result.chunk_tokens = [], [], []
                done = True
            else:
                parser = SSEParser()
                async for chunk in response.content.iter_any():
                    now = time.perf_counter()
                    for data in parser.feed(chunk):
                        if data == b"[DONE]":
                            done = True
                        else:
                            _take(data, result, now, native)
                for data in parser.close():
                    if data == b"[DONE]":
                        done = True
                    else:
                        _take(data, result, time.perf_counter(), native)
    except TimeoutError:
        result.error = f"stalled: no data for {options.stall_timeout:g} s"
    except (aiohttp.ClientError, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        result.error = f"{type(error).__name__}: {error}"
    result.end = time.perf_counter()
    if not native and result.chunk_texts:
        result.text = "".join(result.chunk_texts)
    if not result.error and not done:
        result.error = "the stream ended before [DONE]"
    if not result.error and not result.text and not result.completion_tokens:
        result.error = "the answer has no tokens"
    result.success = not result.error
    return result


def _body_message(data: bytes) -> str:
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = data.decode("utf-8", "replace")
    if isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail") or body
    return _error_message(body)[:200] or "empty answer"
