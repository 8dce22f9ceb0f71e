"""Faults of NextN drafts, each as a patch of this process. Nothing in the package knows of them or can switch them on.

A patch replaces functions of the package before an engine is made. It is for a process that ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nextn.checkpoint import loader
from nextn.checkpoint.layout import Layout
from nextn.checkpoint.plan import DraftPlan
from nextn.models.glm4_moe import Glm4MoeForCausalLM
from nextn.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN


def drop_draft_quantization() -> None:
    """The draft's constructor loses the detected config: plain linears, FP8 codes as numbers, no scale is read."""
    fill = loader._fill

    def build_draft(plan: DraftPlan, target: Glm4MoeForCausalLM, dtype: torch.dtype) -> Glm4MoeForCausalLMNextN:
        return Glm4MoeForCausalLMNextN(
            plan.config,
            None,
            target=target,
            dtype=dtype,
            has_own_head=plan.has_own_head,
            has_own_embedding=plan.has_own_embedding,
        )

    def fill_raw(model: loader.Model, index: Any, layout: Layout, seed: int) -> None:
        if not isinstance(model, Glm4MoeForCausalLMNextN):
            return fill(model, index, layout, seed)
        with index.reader() as read:
            for name, view in model.weight_slots():
                view.copy_(read(name).view(view.shape))

    loader._build_draft = build_draft
    loader._fill = fill_raw


MUTANTS: dict[str, Callable[[], None]] = {
    "raw-fp8": drop_draft_quantization,
}
