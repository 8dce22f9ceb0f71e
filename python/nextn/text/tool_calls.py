"""GLM's tool calls as they arrive.

::

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

GLM-4.5 and 4.6 ("glm45") put newlines between the tags, GLM-4.7 ("glm47") does not. Nothing depends on them: newlines
between tags, and between a call and the text around it, are layout, so one grammar reads both.

What is not a well-formed call ends as follows. ``<tool_call>`` with no plausible name after it is content. Once a name
has been announced, the call stays a call: text between its tags is dropped, an argument that comes twice keeps its
first value, a new ``<tool_call>`` closes an open one. Where the output ends inside a call, the arguments are closed so
that they are JSON: a string is closed where it was cut, any other unfinished argument is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from nextn.text.tags import find_first, num_held_back
from nextn.text.tool_schema import ANY, ToolSchemas

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
KEY_OPEN, KEY_CLOSE = "<arg_key>", "</arg_key>"
VALUE_OPEN, VALUE_CLOSE = "<arg_value>", "</arg_value>"

MAX_LAYOUT_NEWLINES = 64
"""Newlines before a call that are layout. Each is held back until what follows is known; more are content."""

_NAME = re.compile(r"\s{0,16}([^\s<>]{1,256})\s{0,16}(<arg_key>|</tool_call>)")
_NAME_BEGUN = re.compile(r"\s{0,16}(?:[^\s<>]{1,256}\s{0,16}(<.*)?)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ContentText:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A part of the ``index``-th call of the answer.

    name: given once, in a call's first part, which has no arguments
    arguments: a fragment of the arguments' JSON; all fragments together are one JSON object
    is_last: the arguments are complete
    is_cut: the output ended inside the call, and these arguments are what there was of them
    """

    index: int
    name: str | None = None
    arguments: str = ""
    is_last: bool = False
    is_cut: bool = False


class _State(Enum):
    CONTENT = auto()
    NAME = auto()
    BETWEEN = auto()  # in a call, outside an argument
    KEY = auto()
    AFTER_KEY = auto()
    VALUE = auto()


class ToolCallParser:
    """Splits one output into content and calls. Joined, the results do not depend on how the text is cut into pushes.

    tools: those of the request; their schemas decide the types of the arguments. A call of any other name is a call too
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._schemas = ToolSchemas(tools)
        self._state = _State.CONTENT
        self._buffer = ""  # not decided yet
        self._drops_newlines = False
        self._opening = ""  # <tool_call> and the newlines before it, until a name makes it a call
        self._num_calls = 0
        self._name = ""
        self._keys: list[str] = []
        self._key = ""
        self._type = ANY
        self._value: list[str] | None = None  # gathered text of a value that is not passed on as it arrives
        self._events: list[ContentText | ToolCallPart] = []

    @property
    def num_calls(self) -> int:
        """Calls announced so far."""
        return self._num_calls

    def push(self, text: str, finished: bool) -> list[ContentText | ToolCallPart]:
        """Add text; ``finished`` says that no more will come."""
        self._buffer += text
        while self._advance():
            pass
        if finished:
            self._finish()
        events, self._events = self._events, []
        return events

    def _advance(self) -> bool:
        """Take the next tag out of the buffer; False if it takes more text to go on."""
        match self._state:
            case _State.CONTENT:
                return self._read_content()
            case _State.NAME:
                return self._read_name()
            case _State.BETWEEN:
                return self._read_between()
            case _State.KEY:
                return self._read_key()
            case _State.AFTER_KEY:
                return self._read_after_key()
            case _State.VALUE:
                return self._read_value()

    def _read_content(self) -> bool:
        if self._drops_newlines:
            self._buffer = self._buffer.lstrip("\n")
            self._drops_newlines = not self._buffer
        at = self._buffer.find(CALL_OPEN)
        end = at if at >= 0 else len(self._buffer) - num_held_back(self._buffer, (CALL_OPEN,))
        content = self._buffer[:end]
        content = content[: max(len(content.rstrip("\n")), end - MAX_LAYOUT_NEWLINES)]
        self._emit_content(content)
        if at < 0:
            self._buffer = self._buffer[len(content) :]
            return False
        self._opening = self._buffer[len(content) : at + len(CALL_OPEN)]
        self._buffer = self._buffer[at + len(CALL_OPEN) :]
        self._state = _State.NAME
        return True

    def _read_name(self) -> bool:
        match = _NAME.match(self._buffer)
        if match is None:
            begun = _NAME_BEGUN.fullmatch(self._buffer)
            if begun and any(tag.startswith(begun[1] or "") for tag in (KEY_OPEN, CALL_CLOSE)):
                return False
            self._give_up_call()
            return True
        self._name, self._keys = match[1], []
        self._events.append(ToolCallPart(self._num_calls, name=self._name))
        self._num_calls += 1
        self._buffer = self._buffer[match.start(2) :]
        self._state = _State.BETWEEN
        return True

    def _give_up_call(self) -> None:
        self._emit_content(self._opening)
        self._state = _State.CONTENT

    def _read_between(self) -> bool:
        tag = self._skip_to(KEY_OPEN, CALL_CLOSE, CALL_OPEN)
        if tag == KEY_OPEN:
            self._state = _State.KEY
        elif tag is not None:
            self._close_call(reopens=tag == CALL_OPEN)
        return tag is not None

    def _read_key(self) -> bool:
        found = find_first(self._buffer, (KEY_CLOSE, VALUE_OPEN, CALL_CLOSE))
        if found is None:
            return False
        at, tag = found
        self._key = self._buffer[:at].strip()
        self._buffer = self._buffer[at + len(tag) :]
        if tag == CALL_CLOSE:
            self._close_call()
        elif tag == VALUE_OPEN:
            self._open_value()
        else:
            self._state = _State.AFTER_KEY
        return True

    def _read_after_key(self) -> bool:
        tag = self._skip_to(VALUE_OPEN, KEY_OPEN, CALL_CLOSE, CALL_OPEN)
        if tag == VALUE_OPEN:
            self._open_value()
        elif tag == KEY_OPEN:
            self._state = _State.KEY
        elif tag is not None:
            self._close_call(reopens=tag == CALL_OPEN)
        return tag is not None

    def _open_value(self) -> None:
        self._type = self._schemas.type_of(self._name, self._key)
        self._value = [] if not self._type.is_text or self._key in self._keys else None
        if self._value is None:
            self._emit_arguments(self._key_text() + '"')
        self._state = _State.VALUE

    def _read_value(self) -> bool:
        at = self._buffer.find(VALUE_CLOSE)
        end = at if at >= 0 else len(self._buffer) - num_held_back(self._buffer, (VALUE_CLOSE,))
        self._add_to_value(self._buffer[:end])
        if at < 0:
            self._buffer = self._buffer[end:]
            return False
        self._buffer = self._buffer[at + len(VALUE_CLOSE) :]
        if self._value is None:
            self._emit_arguments('"')
        elif self._key not in self._keys:
            self._emit_arguments(self._key_text() + self._type.to_json("".join(self._value)))
        self._keys.append(self._key)
        self._state = _State.BETWEEN
        return True

    def _add_to_value(self, text: str) -> None:
        if self._value is not None:
            self._value.append(text)
        else:
            self._emit_arguments(_quote(text)[1:-1])

    def _key_text(self) -> str:
        return f"{', ' if self._keys else '{'}{_quote(self._key)}: "

    def _close_call(self, reopens: bool = False, is_cut: bool = False) -> None:
        self._emit_arguments("}" if self._keys else "{}")
        last = self._events[-1]
        assert isinstance(last, ToolCallPart)
        self._events[-1] = replace(last, is_last=True, is_cut=is_cut)
        self._buffer = CALL_OPEN + self._buffer if reopens else self._buffer
        self._drops_newlines = True
        self._state = _State.CONTENT

    def _finish(self) -> None:
        if self._state is _State.NAME:
            self._give_up_call()
        if self._state is _State.VALUE and self._value is None:
            self._add_to_value(self._buffer)
            self._emit_arguments('"')
            self._keys.append(self._key)
        if self._state is _State.CONTENT:
            self._emit_content(self._buffer)
        else:
            self._close_call(is_cut=True)
        self._buffer = ""

    def _skip_to(self, *tags: str) -> str | None:
        """Drop the buffer up to and with the first of ``tags``; None if none has come."""
        found = find_first(self._buffer, tags)
        if found is None:
            self._buffer = self._buffer[len(self._buffer) - num_held_back(self._buffer, tags) :]
            return None
        at, tag = found
        self._buffer = self._buffer[at + len(tag) :]
        return tag

    def _emit_content(self, text: str) -> None:
        if not text:
            return
        if self._events and isinstance(last := self._events[-1], ContentText):
            self._events[-1] = ContentText(last.text + text)
        else:
            self._events.append(ContentText(text))

    def _emit_arguments(self, fragment: str) -> None:
        """Add to the open call's arguments; its name stays a part of its own."""
        if not fragment:
            return
        index = self._num_calls - 1
        last = self._events[-1] if self._events else None
        if isinstance(last, ToolCallPart) and last.index == index and last.name is None:
            self._events[-1] = replace(last, arguments=last.arguments + fragment)
        else:
            self._events.append(ToolCallPart(index, arguments=fragment))


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
