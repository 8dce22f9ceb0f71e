"""GLM's reasoning, ``<think>…</think>`` before the answer, set apart from the answer while the text arrives.

GLM-4.5 and 4.6 write ``<think>`` themselves; the prompt of GLM-4.7 ends with it, so that the output begins inside. The
prompt's end tells which. Newlines next to a tag, and at the beginning of the output, are layout and are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from nextn.text.tags import find_first, num_held_back

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
CALL_OPEN = "<tool_call>"

MAX_LAYOUT_NEWLINES = 64
"""Newlines before a closing tag that are layout. Each is held back until what follows is known; more are text."""


def starts_inside_reasoning(prompt: str) -> bool:
    """True if the rendered prompt has opened the reasoning that the model goes on with."""
    return prompt.rstrip().endswith(THINK_OPEN)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """What a push added to the two texts. Content follows reasoning."""

    reasoning: str = ""
    content: str = ""


class _State(Enum):
    OPENING = auto()  # nothing but newlines and a part of <think> so far
    REASONING = auto()
    CONTENT = auto()


class ReasoningParser:
    """Splits one output. The concatenated results do not depend on how the text is cut into pushes.

    A ``<tool_call>`` inside the reasoning ends it, and stays in the content. Reasoning that the output's end cuts
    short is still reasoning. An output that does not begin with ``<think>``, and does not start inside, is content.
    """

    def __init__(self, starts_inside: bool) -> None:
        self._after_opening = _State.REASONING if starts_inside else _State.CONTENT
        self._state = _State.OPENING
        self._buffer = ""
        self._drops_newlines = True
        self._ended_by_call = False

    @property
    def ended_by_call(self) -> bool:
        """True once a ``<tool_call>`` has ended the reasoning: its ``</think>`` may still follow, as content."""
        return self._ended_by_call

    def push(self, text: str, finished: bool) -> ReasoningDelta:
        """Add text; ``finished`` says that no more will come."""
        self._buffer += text
        if self._drops_newlines:
            self._buffer = self._buffer.lstrip("\n")
        if self._state is _State.OPENING:
            self._open(finished)
        reasoning = self._take_reasoning(finished) if self._state is _State.REASONING else ""
        content = self._take_content() if self._state is _State.CONTENT else ""
        return ReasoningDelta(reasoning, content)

    def _open(self, finished: bool) -> None:
        if self._buffer.startswith(THINK_OPEN):
            self._buffer = self._buffer[len(THINK_OPEN) :].lstrip("\n")
            self._state = _State.REASONING
        elif finished or not THINK_OPEN.startswith(self._buffer):
            self._state = self._after_opening

    def _take_reasoning(self, finished: bool) -> str:
        self._drops_newlines = self._drops_newlines and not self._buffer
        found = find_first(self._buffer, (THINK_CLOSE, CALL_OPEN))
        if found is not None:
            at, tag = found
            reasoning = _without_layout(self._buffer[:at])
            self._ended_by_call = tag == CALL_OPEN
            self._buffer = self._buffer[at if self._ended_by_call else at + len(tag) :].lstrip("\n")
            self._drops_newlines = True
            self._state = _State.CONTENT
            return reasoning
        safe = self._buffer
        if not finished:
            safe = _without_layout(safe[: len(safe) - num_held_back(safe, (THINK_CLOSE, CALL_OPEN))])
        self._buffer = self._buffer[len(safe) :]
        return safe

    def _take_content(self) -> str:
        content, self._buffer = self._buffer, ""
        self._drops_newlines = self._drops_newlines and not content
        return content


def _without_layout(text: str) -> str:
    return text[: max(len(text.rstrip("\n")), len(text) - MAX_LAYOUT_NEWLINES)]
