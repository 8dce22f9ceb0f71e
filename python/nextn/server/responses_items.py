"""What ``/v1/responses`` answers: items (reasoning, a message, calls) and the events of their growing."""

from __future__ import annotations

import random
from typing import Any

from nextn.server.answers import ChatDelta
from nextn.server.responses_request import sealed

Event = dict[str, Any]
"""A server-sent event, without its number."""

_ID_PREFIX = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_PART_TYPE = {"reasoning": "reasoning_text", "message": "output_text"}


class OutputItems:
    """Builds the items of one answer from the deltas of a chat.

    items: in order; the last may still grow
    seals_reasoning: reasoning comes in ``encrypted_content`` as well
    """

    def __init__(self, *, seals_reasoning: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._seals_reasoning = seals_reasoning
        self._is_open = False
        self._texts: list[str] = []  # of the item that is open, or blanks that no message has begun with yet

    @property
    def reasoning(self) -> str:
        """All of it."""
        return "".join(item["content"][0]["text"] for item in self.items if item["type"] == "reasoning")

    def add(self, delta: ChatDelta) -> list[Event]:
        events: list[Event] = []
        if delta.reasoning_content:
            events += self._grow("reasoning", delta.reasoning_content)
        if delta.content:
            events += self._grow("message", delta.content)
        for call in delta.tool_calls or ():
            if call.id is not None:
                events += self._close() + self._open("function_call", call_id=call.id, name=call.function.name)
            if call.function.arguments:
                events += self._grow("function_call", call.function.arguments)
        return events

    def end(self, *, is_cut: bool) -> list[Event]:
        """The answer is over. is_cut: before the last item was complete"""
        events: list[Event] = []
        if self._texts and not self._is_open and not self.items:
            blanks = self._texts
            events += self._open("message")
            self._texts = blanks
        return events + self._close("incomplete" if is_cut else "completed")

    def _grow(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self.items[-1]["type"] != kind:
            events += self._close()
            if kind == "message" and not text.strip():
                self._texts.append(text)
                return events  # what separates reasoning from a call is no message
            text = "".join([*self._texts, text]) if kind == "message" else text
            events += self._open(kind)
        self._texts.append(text)
        name = "function_call_arguments" if kind == "function_call" else _PART_TYPE[kind]
        event = {"type": f"response.{name}.delta", **self._place(kind), "delta": text}
        return [*events, {**event, "logprobs": []} if kind == "message" else event]

    def _open(self, kind: str, **fields: Any) -> list[Event]:
        item: dict[str, Any] = {"type": kind, "id": f"{_ID_PREFIX[kind]}_{random.getrandbits(96):024x}", **fields}
        item |= {"status": "in_progress", **_content(kind, None)}
        if kind == "message":
            item["role"] = "assistant"
        self.items.append(item)
        self._is_open, self._texts = True, []
        events: list[Event] = [
            {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}
        ]
        if kind in _PART_TYPE:
            events.append({"type": "response.content_part.added", **self._place(kind), "part": _part(kind, "")})
        return events

    def _close(self, status: str = "completed") -> list[Event]:
        if not self._is_open:
            return []
        text, self._texts, self._is_open = "".join(self._texts), [], False
        item = self.items[-1]
        kind, place = item["type"], self._place(item["type"])
        item = {**item, "status": status, **_content(kind, text)}
        if kind == "reasoning" and self._seals_reasoning:
            item["encrypted_content"] = sealed(text)
        self.items[-1] = item
        done = {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        if kind == "function_call":
            name = "response.function_call_arguments.done"
            return [{"type": name, **place, "name": item["name"], "arguments": text}, done]
        of_text: Event = {"type": f"response.{_PART_TYPE[kind]}.done", **place, "text": text}
        return [
            {**of_text, "logprobs": []} if kind == "message" else of_text,
            {"type": "response.content_part.done", **place, "part": _part(kind, text)},
            done,
        ]

    def _place(self, kind: str) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {**place, "content_index": 0} if kind in _PART_TYPE else place


def _content(kind: str, text: str | None) -> dict[str, Any]:
    """The fields of an item that hold its text; None is none yet."""
    if kind == "function_call":
        return {"arguments": text or ""}
    content = [] if text is None else [_part(kind, text)]
    return {"content": content} if kind == "message" else {"summary": [], "content": content}


def _part(kind: str, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PART_TYPE[kind], "text": text}
    return {**part, "annotations": [], "logprobs": []} if kind == "message" else part
