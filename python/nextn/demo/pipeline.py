"""The stages of the build, and how each finds what the one before left behind."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Glm4MoeForCausalLM

    from nextn.demo.training import Budget

DEFAULT_TARGET_MINUTES = 70.0
DEFAULT_NEXTN_MINUTES = 15.0


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """One build. Minutes and steps of a stage exclude each other; with neither, the default minutes hold."""

    work_dir: Path
    out: Path | None = None
    resume: bool = False
    seed: int = 0
    num_threads: int = 2
    target_minutes: float | None = None
    target_steps: int | None = None
    nextn_minutes: float | None = None
    nextn_steps: int | None = None
    notes: str = ""

    @property
    def checkpoint(self) -> Path:
        if self.out is None:
            raise ValueError("this stage writes a checkpoint and needs its folder; pass --out")
        return self.out


def _budget(minutes: float | None, steps: int | None, default_minutes: float) -> "Budget":
    from nextn.demo.training import Budget

    return Budget(steps=steps, minutes=None if steps is not None else minutes or default_minutes)


def _tokenizer(work_dir: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = work_dir / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no tokenizer there; run the tokenizer stage first")
    return Tokenizer.from_file(str(path))


def _trained_target(options: BuildOptions, tokenizer: "Tokenizer") -> "Glm4MoeForCausalLM":
    import torch

    from nextn.demo.train_target import new_target

    target = new_target(tokenizer, options.seed)
    target.load_state_dict(torch.load(options.work_dir / "target.pt", weights_only=True)["module"])
    return target.eval()


def make_tokenizer(options: BuildOptions) -> None:
    from nextn.demo.tokenizer import train_tokenizer

    path = options.work_dir / "tokenizer.json"
    if not (options.resume and path.exists()):
        train_tokenizer(options.seed).save(str(path))


def make_target(options: BuildOptions) -> None:
    from nextn.demo.train_target import train_target

    budget = _budget(options.target_minutes, options.target_steps, DEFAULT_TARGET_MINUTES)
    train_target(_tokenizer(options.work_dir), options.work_dir, budget, options.seed, options.resume)


def make_nextn(options: BuildOptions) -> None:
    from nextn.demo.train_nextn import train_nextn

    tokenizer = _tokenizer(options.work_dir)
    budget = _budget(options.nextn_minutes, options.nextn_steps, DEFAULT_NEXTN_MINUTES)
    target = _trained_target(options, tokenizer)
    train_nextn(tokenizer, target, options.work_dir, budget, options.seed, options.resume)


def make_checkpoint(options: BuildOptions) -> None:
    import torch

    from nextn.demo.checkpoint_files import save_checkpoint
    from nextn.demo.modeling import build_nextn

    tokenizer = _tokenizer(options.work_dir)
    target = _trained_target(options, tokenizer)
    nextn = build_nextn(target.config, target, options.seed)
    nextn.load_state_dict(torch.load(options.work_dir / "nextn.pt", weights_only=True)["module"])
    save_checkpoint(options.checkpoint, tokenizer, target, nextn)


def _training_record(options: BuildOptions) -> list[dict[str, Any]]:
    import torch

    from nextn.demo import train_nextn, train_target

    stages = {"target": train_target.TOKENS_PER_STEP, "nextn": train_nextn.TOKENS_PER_STEP}
    record = []
    for stage, tokens_per_step in stages.items():
        state = torch.load(options.work_dir / f"{stage}.pt", weights_only=True)
        record.append({
            "stage": stage, "steps": state["step"], "tokens": state["step"] * tokens_per_step,
            "minutes": state["elapsed_s"] / 60,
        })  # fmt: skip
    return record


def make_card(options: BuildOptions) -> None:
    from nextn.demo.card import model_card

    out = options.checkpoint
    summary = run_evaluation(out, options.seed, options.work_dir / "evaluation.json", num_wrong=0)
    config = json.loads((out / "config.json").read_text())
    size = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    (out / "README.md").write_text(model_card(config, size, summary, _training_record(options), options.notes))


def build(options: BuildOptions, stages: Sequence[str]) -> None:
    """Run the stages in the given order."""
    from nextn.demo.training import prepare_cpu

    prepare_cpu(options.num_threads)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    run = {
        "tokenizer": make_tokenizer,
        "target": make_target,
        "nextn": make_nextn,
        "quantize": make_checkpoint,
        "card": make_card,
    }
    for stage in stages:
        print(f"stage {stage}", flush=True)
        run[stage](options)


def run_evaluation(model_path: Path | None, seed: int, json_path: Path | None, num_wrong: int) -> dict[str, Any]:
    """Measure, print, and write the figures if asked to."""
    from nextn.demo.evaluate import as_table, categories_table, evaluate

    summary, answers = evaluate(model_path, seed)
    print(as_table(summary))
    for part in summary["parts"]:
        print(f"\n{part}\n{categories_table(summary, part)}")
    for answer in [answer for answer in answers if not answer.is_right][:num_wrong]:
        print(f"\n{answer.item.prompt[-200:]!r}\n  gave     {answer.text!r}\n  expected {answer.item.expected!r}")
    if json_path is not None:
        json_path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary
