"""The corpus as an endless numbered stream: document `index` of `seed` is the same on every run, so that a training
run resumes by knowing only how far it was."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from nextn.demo.chat_template import Span, render
from nextn.demo.corpus import lessons, package_text, prose, slots, tools
from nextn.demo.corpus.lessons import Lesson, Make
from nextn.demo.corpus.split import is_held_out

SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are a friendly assistant.", "You are the embedded model of nextn.",
    "Answer the questions of the user.", "You are a teacher who explains things in simple words.",
    "Be polite and helpful.",
]  # fmt: skip
BRIEF_PROMPTS = ["Answer with one word.", "Give only the answer.", "Be brief."]

_KINDS: dict[str, tuple[Make, float]] = {
    **lessons.QUIZ_KINDS, **lessons.OTHER_KINDS,
    "story": (prose.story, 3), "python": (prose.python_snippet, 4), "small talk": (prose.small_talk, 6),
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool


def draw(make: Callable[[Random], Any], rng: Random, held_out: bool) -> Any:
    """The first thing that `make` gives which lies on the asked side of the split."""
    while True:
        item = make(rng)
        if is_held_out(item.key) == held_out:
            return item


def _any_lesson(rng: Random) -> Lesson:
    make = rng.choices([kind[0] for kind in _KINDS.values()], [kind[1] for kind in _KINDS.values()])[0]
    lesson: Lesson = draw(make, rng, held_out=False)
    return lesson


def _dress(question: str, rng: Random) -> str:
    """Small surface changes that leave the meaning alone."""
    roll = rng.random()
    if roll < 0.06:
        return "Please tell me: " + question
    if roll < 0.12:
        return rng.choice(("Hi! ", "Hello! ", "OK. ", "Thanks. ", "Next question: ")) + question
    if roll < 0.16:
        return question + " Thank you."
    return question


def answer_message(lesson: Lesson, brief: bool = False) -> dict[str, Any]:
    content = lesson.expected if brief else lesson.answer
    return {"role": "assistant", "reasoning_content": lesson.reasoning, "content": content}


def chat(rng: Random) -> Conversation:
    """One to four questions, now and then under a system prompt."""
    messages: list[dict[str, Any]] = []
    brief = rng.random() < 0.06
    if brief:
        messages.append({"role": "system", "content": rng.choice(BRIEF_PROMPTS)})
    elif rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choices((1, 2, 3, 4), (60, 20, 12, 8))[0]):
        lesson = _any_lesson(rng)
        messages += [{"role": "user", "content": _dress(lesson.question, rng)}, answer_message(lesson, brief)]
    return Conversation(messages, None, thinking=rng.random() < 0.45)


def name_memory(rng: Random) -> Conversation:
    """The user gives a name, talks of something else, and asks for the name."""
    who = slots.name(rng)
    greeting = rng.choice(("My name is {}.", "Hi, I am {}.", "Hello, my name is {}.")).format(who)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": greeting},
        {"role": "assistant", "reasoning_content": f"The user is called {who}. I will greet them.",
         "content": f"Nice to meet you, {who}! How can I help you?"},
    ]  # fmt: skip
    for _ in range(rng.randrange(3)):
        lesson = _any_lesson(rng)
        messages += [{"role": "user", "content": lesson.question}, answer_message(lesson)]
    question = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": f"The user said that their name is {who}.",
         "content": f"Your name is {who}."},
    ]  # fmt: skip
    return Conversation(messages, None, thinking=rng.random() < 0.45)


def tool_turn(use: tools.ToolUse) -> list[dict[str, Any]]:
    """Request, call, result and answer."""
    call = {"type": "function", "function": {"name": use.name, "arguments": use.arguments}}
    return [
        {"role": "user", "content": use.question},
        {"role": "assistant", "reasoning_content": use.reasoning, "content": "", "tool_calls": [call]},
        {"role": "tool", "content": use.result},
        {"role": "assistant", "reasoning_content": "The tool gave a result. I will tell the user.",
         "content": use.answer},
    ]  # fmt: skip


def tool_chat(rng: Random) -> Conversation:
    """A conversation with tools at hand: mostly used, sometimes not needed, sometimes after other turns."""

    drawn = draw(tools.DrawnUse, rng, held_out=False)
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    if rng.random() < 0.15:
        lesson = _no_sum(rng)
        messages += [{"role": "user", "content": lesson.question}, answer_message(lesson)]
    if rng.random() < 0.88 or not messages:
        messages += tool_turn(drawn.use)[: 2 if rng.random() < 0.2 else 4]
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls") and rng.random() < 0.12:
        lesson = _no_sum(rng)
        messages += [{"role": "user", "content": lesson.question}, answer_message(lesson)]
    if messages[-1]["role"] == "system":
        messages += tool_turn(drawn.use)
    return Conversation(messages, drawn.schemas, thinking=rng.random() < 0.45)


def _no_sum(rng: Random) -> Lesson:
    """A question that no tool could answer better."""
    while True:
        lesson = _any_lesson(rng)
        if lesson.category not in ("arithmetic", "repetition"):
            return lesson


@cache
def _plain_texts() -> tuple[str, ...]:
    return tuple(package_text.paragraphs())


def plain_text(rng: Random) -> str:
    """Text without turns: a docstring, or a few statements of fact, so that bare completion prompts work too."""
    if rng.random() < 0.3:
        return rng.choice(_plain_texts())
    return " ".join(_any_lesson(rng).answer for _ in range(rng.randint(1, 4)))


def document(seed: int, index: int) -> list[Span]:
    """Document `index` of the training stream."""
    rng = Random(f"{seed}/{index}")
    roll = rng.random()
    if roll < 0.03:
        start = [Span("[gMASK]<sop>", 0.0)] if rng.random() < 0.5 else []
        return [*start, Span(plain_text(rng) + "<|endoftext|>", 0.5)]
    if roll < 0.06:
        conversation = name_memory(rng)
    elif roll < 0.33:
        conversation = tool_chat(rng)
    else:
        conversation = chat(rng)
    return render(conversation.messages, conversation.tools, conversation.thinking)
