"""Held-out prompts and how their answers are marked. None of them can occur in training: see `corpus.split`."""

import json
import re
from dataclasses import dataclass
from random import Random
from typing import Any

from nextn.demo.chat_template import prompt_text
from nextn.demo.corpus import lessons, prose, tools
from nextn.demo.corpus.stream import draw, tool_turn

_CALL = re.compile(
    r"<tool_call>([^\n<]+)\n((?:<arg_key>[^<]+</arg_key>\n<arg_value>.*?</arg_value>\n)*)</tool_call>", re.S
)
_ARGUMENT = re.compile(r"<arg_key>([^<]+)</arg_key>\n<arg_value>(.*?)</arg_value>\n", re.S)


@dataclass(frozen=True)
class Item:
    """One prompt. `part` says what it tests: "quiz", "tool call", "tool answer" or "open"."""

    part: str
    category: str
    prompt: str
    thinking: bool
    expected: str | dict[str, Any]

    def is_right(self, text: str) -> bool:
        """Whether a model's output, with its markup tokens kept, is the expected answer or call, to the letter."""
        if self.thinking:
            reasoning, closing, text = text.partition("</think>")
            if not closing or not reasoning.lstrip("\n").startswith("<think>"):
                return False
        text = text.strip()
        if isinstance(self.expected, str):
            return text == self.expected
        return parse_call(text) == self.expected


def parse_call(text: str) -> dict[str, Any] | None:
    """The one well-formed call that `text` consists of, or None."""
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    return {"name": match[1], "arguments": dict(_ARGUMENT.findall(match[2]))}


def _lesson_item(part: str, kinds: dict[str, tuple[lessons.Make, float]], rng: Random) -> Item:
    category = rng.choices(list(kinds), [share for _, share in kinds.values()])[0]
    lesson: lessons.Lesson = draw(kinds[category][0], rng, held_out=True)
    thinking = rng.random() < 0.5
    prompt = prompt_text([{"role": "user", "content": lesson.question}], None, thinking)
    return Item(part, category, prompt, thinking, lesson.answer)


def _tool_items(rng: Random) -> tuple[Item, Item]:
    """The call, and the answer that follows its result."""
    drawn = draw(tools.DrawnUse, rng, held_out=True)
    use, thinking = drawn.use, rng.random() < 0.5
    turn = tool_turn(use)
    arguments = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in use.arguments.items()
    }
    call = Item("tool call", use.category, prompt_text(turn[:1], drawn.schemas, thinking), thinking,
                {"name": use.name, "arguments": arguments})  # fmt: skip
    answer = Item("tool answer", use.category, prompt_text(turn[:3], drawn.schemas, thinking), thinking, use.answer)
    return call, answer


_OPEN_KINDS: dict[str, tuple[lessons.Make, float]] = {
    **lessons.OTHER_KINDS,
    "story": (prose.story, 4), "python": (prose.python_snippet, 4),
}  # fmt: skip


def held_out_items(seed: int, num_quiz: int, num_tools: int, num_open: int) -> list[Item]:
    """The evaluation set, the same for the same arguments.

    The numbers are of draws; a prompt that is drawn again is left out, so there are somewhat fewer items.
    """
    rng = Random(f"quiz/{seed}")
    items = [_lesson_item("quiz", lessons.QUIZ_KINDS, rng) for _ in range(num_quiz)]
    for _ in range(num_tools):
        items += _tool_items(rng)
    items += [_lesson_item("open", _OPEN_KINDS, rng) for _ in range(num_open)]
    return list({item.prompt: item for item in items}.values())
