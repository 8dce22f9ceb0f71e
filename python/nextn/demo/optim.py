"""Muon for the matrices, AdamW for everything else."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def orthogonalize(update: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration toward the nearest semi-orthogonal matrix (Jordan et al., 2024), for a batch.

    update: [B, rows, cols]. Returns the same shape with singular values near one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16()
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized per matrix; a 3-D parameter is a batch of matrices.

    `gate_up_proj` holds two stacked matrices per expert and is taken apart for the update.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(state["momentum"], group["momentum"])
                shape = update.shape
                if update.dim() == 2:
                    update = update.unsqueeze(0)
                elif shape[2] > shape[1] / 2 and shape[1] % 2 == 0 and getattr(param, "is_stacked_pair", False):
                    update = update.reshape(shape[0] * 2, shape[1] // 2, shape[2])
                scale = math.sqrt(max(1.0, update.shape[1] / update.shape[2]))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonalize(update).reshape(shape), alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Matrices inside the layers go to Muon; embeddings, head, router, norms and biases to AdamW."""
    matrices: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if name.endswith("gate_up_proj"):
            param.is_stacked_pair = True  # type: ignore[attr-defined]
        is_matrix = param.dim() >= 2 and not any(
            part in name for part in ("embed_tokens", "lm_head", "mlp.gate.weight")
        )
        (matrices if is_matrix else rest).append(param)
    return [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], base: list[float], factor: float) -> None:
    for optimizer, lr in zip(optimizers, base, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
