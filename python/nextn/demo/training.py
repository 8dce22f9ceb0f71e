"""The loop that both training stages share: a budget, a schedule, checkpoints, progress."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nextn.demo.optim import set_learning_rate


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps (repeatable to the bit) or of minutes (ends on time on any machine)."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("a training budget is either steps or minutes; give exactly one of the two")

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the budget is used, from 0 to 1."""
        used = step / self.steps if self.steps is not None else elapsed_s / 60 / (self.minutes or 1.0)
        return min(used, 1.0)


def schedule(progress: float, step: int, warmup_steps: int = 40, stable_until: float = 0.45) -> float:
    """Learning-rate factor: a warm-up in steps, a plateau, then a straight line to nearly zero."""
    decay = 1.0 if progress < stable_until else (1.0 - progress) / (1.0 - stable_until)
    return min(1.0, (step + 1) / warmup_steps) * max(decay, 0.01)


def prepare_cpu(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


class Run:
    """One stage's state on disk and in memory: the module, its optimizers, how many steps, how many seconds.

    A batch depends on its step only, so these are all that a resumed run needs to end in the same weights.
    """

    def __init__(self, path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.path, self.module, self.optimizers = path, module, optimizers
        self.base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.step, self.elapsed_s = 0, 0.0

    def load(self) -> None:
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]

    def save(self) -> None:
        """Write the checkpoint next to its final place and move it there, so that a crash leaves a whole file."""
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def train(
        self,
        budget: Budget,
        loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        after_step: Callable[[float], dict[str, float]],
        save_every_s: float = 120.0,
        stop_after_steps: int | None = None,
    ) -> None:
        """Train until the budget is used up.

        loss_at: step -> (loss, figures to show). after_step: progress -> more figures, called after each update.
        stop_after_steps: leave early with a checkpoint, as an interruption would.
        """
        log = self.path.with_suffix(".jsonl").open("a")
        started, last_save = time.monotonic() - self.elapsed_s, time.monotonic()
        first_step = self.step
        parameters = [param for param in self.module.parameters() if param.requires_grad]
        with tqdm(
            total=100.0, desc=self.path.stem, unit="%", mininterval=10.0, bar_format="{l_bar}{bar}| {postfix}"
        ) as bar:
            while (progress := budget.progress(self.step, self.elapsed_s)) < 1.0:
                if stop_after_steps is not None and self.step - first_step >= stop_after_steps:
                    break
                set_learning_rate(self.optimizers, self.base_lr, schedule(progress, self.step))
                loss, figures = loss_at(self.step)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                figures |= after_step(progress)
                self.step += 1
                self.elapsed_s = time.monotonic() - started
                if self.step % 10 == 0:
                    row = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1), "loss": loss.item(), **figures}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                bar.set_postfix({"step": self.step, "loss": f"{loss.item():.3f}", **figures}, refresh=False)
                bar.update(100 * progress - bar.n)
                if time.monotonic() - last_save > save_every_s:
                    self.save()
                    last_save = time.monotonic()
        log.close()
        self.save()
