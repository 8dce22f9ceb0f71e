"""What is sent, and what was observed."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BenchRequest:
    """One prompt, as text or as token ids (exactly one of the two), and how many tokens to ask for."""

    prompt_len: int
    output_len: int
    text: str | None = None
    input_ids: list[int] | None = None


@dataclass
class RequestResult:
    """Observations of one request. Times are seconds of one monotonic clock; counts are tokens."""

    start: float
    prompt_len: int
    end: float = 0.0
    success: bool = False
    error: str = ""
    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    spec_verify_ct: int | None = None
    chunk_times: list[float] = field(default_factory=list)
    chunk_texts: list[str] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    retokenized_tokens: int | None = None

    @property
    def latency(self) -> float:
        """End-to-end latency, seconds: from just before sending to the end of the answer."""
        return self.end - self.start

    @property
    def output_tokens(self) -> int:
        """Generated tokens: the server's count if it gave one, else the retokenized one, else one per chunk."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return self.retokenized_tokens if self.retokenized_tokens is not None else len(self.chunk_times)
