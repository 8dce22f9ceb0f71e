"""Measure a checkpoint on the held-out prompts, through nextn's own engine with its drafts on."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextn.demo.quiz import Item, held_out_items
from nextn.llm import LLM, SamplingParams

MAX_NEW_TOKENS = 192
NUM_DRAFTS = 3
"""Per verify pass, fixed: the accept length says how good the layer is, not what the policy makes of it."""


@dataclass(frozen=True)
class Answer:
    """What the engine said to one item, and at what cost."""

    item: Item
    text: str
    num_tokens: int
    num_verifies: int

    @property
    def is_right(self) -> bool:
        return self.item.is_right(self.text)


def accept_length(answers: Iterable[Answer]) -> float:
    """Generated tokens per verify pass over all of them, the bonus token included."""
    pairs = [(answer.num_tokens, answer.num_verifies) for answer in answers]
    return sum(tokens for tokens, _ in pairs) / max(1, sum(verifies for _, verifies in pairs))


def _share_right(answers: list[Answer]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)


def ask(llm: LLM, items: list[Item]) -> list[Answer]:
    """Greedy answers to all items."""
    outputs = llm.generate(
        [item.prompt for item in items], SamplingParams(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    )
    return [
        Answer(item, output.text, output.meta_info["completion_tokens"], output.meta_info["spec_verify_ct"])
        for item, output in zip(items, outputs, strict=True)
    ]


def summarize(answers: list[Answer]) -> dict[str, Any]:
    """Right answers and accept length for each part, and right answers for each category in it."""
    parts: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        parts[answer.item.part].append(answer)
    summary: dict[str, Any] = {}
    for part, chosen in parts.items():
        categories: dict[str, list[Answer]] = defaultdict(list)
        for answer in chosen:
            categories[answer.item.category].append(answer)
        summary[part] = {
            "num_prompts": len(chosen),
            "right": round(_share_right(chosen), 4),
            "right_with_thinking": round(_share_right([a for a in chosen if a.item.thinking]), 4),
            "right_without_thinking": round(_share_right([a for a in chosen if not a.item.thinking]), 4),
            "accept_length": round(accept_length(chosen), 3),
            "by_category": {
                name: {"num_prompts": len(group), "right": round(_share_right(group), 4)}
                for name, group in sorted(categories.items())
            },
        }
    return {"num_prompts": len(answers), "accept_length": round(accept_length(answers), 3), "parts": summary}


def evaluate(
    model_path: Path | None, seed: int = 0, num_quiz: int = 400, num_tools: int = 150, num_open: int = 120
) -> tuple[dict[str, Any], list[Answer]]:
    """Ask everything and sum it up. model_path None is the embedded checkpoint."""
    items = held_out_items(seed, num_quiz, num_tools, num_open)
    path = None if model_path is None else str(model_path)
    llm = LLM(model_path=path, speculative_num_steps=NUM_DRAFTS)
    answers = ask(llm, items)
    return summarize(answers), answers


def as_table(summary: dict[str, Any]) -> str:
    """A Markdown table of the parts."""
    lines = [
        "| held-out prompts | number | right | with thinking | without | accept length |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in summary["parts"].items():
        lines.append(
            f"| {name} | {part['num_prompts']} | {part['right']:.1%} | {part['right_with_thinking']:.1%} "
            f"| {part['right_without_thinking']:.1%} | {part['accept_length']:.2f} |"
        )
    lines.append(f"| all | {summary['num_prompts']} | | | | {summary['accept_length']:.2f} |")
    return "\n".join(lines)


def categories_table(summary: dict[str, Any], part: str) -> str:
    """A Markdown table of one part's categories."""
    lines = ["| category | number | right |", "|---|---|---|"]
    for name, figures in summary["parts"][part]["by_category"].items():
        lines.append(f"| {name} | {figures['num_prompts']} | {figures['right']:.1%} |")
    return "\n".join(lines)
