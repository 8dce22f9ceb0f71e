"""Stage: train the NextN layer to guess what the quantized target will say, three tokens ahead."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Glm4MoeForCausalLM

from nextn.demo.checkpoint_files import serving_weights
from nextn.demo.draft_steps import draft_steps
from nextn.demo.modeling import LoadBalancer, NextN, build_nextn
from nextn.demo.optim import make_optimizers
from nextn.demo.packing import make_batch
from nextn.demo.training import Budget, Run

TOKENS_PER_STEP = 6144
NUM_DRAFT_STEPS = 3
DATA_SHARE = 0.1
"""How much of the loss is the corpus's own next token; the rest is the target's distribution."""

_STEP_OFFSET = 1 << 20
"""Batches of this stage lie beyond any that the target stage reaches."""


def draft_loss(
    logits: torch.Tensor, target_logits: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distillation mixed with data.

    logits, target_logits: [n, vocab]; tokens: [n] int64. Returns the mean loss and whether each draft is the target's
    own choice [n] bool.
    """
    logits, target_logits = logits.float(), target_logits.float()
    distilled = F.cross_entropy(logits, target_logits.softmax(-1))
    data = F.cross_entropy(logits, tokens)
    accepted = logits.detach().argmax(-1) == target_logits.argmax(-1)
    return (1 - DATA_SHARE) * distilled + DATA_SHARE * data, accepted


def train_nextn(
    tokenizer: Tokenizer,
    target: Glm4MoeForCausalLM,
    work_dir: Path,
    budget: Budget,
    seed: int,
    resume: bool,
    tokens_per_step: int = TOKENS_PER_STEP,
    stop_after_steps: int | None = None,
) -> NextN:
    """Train on the frozen target as it will be served; state goes to `work_dir/nextn.pt`."""
    target.load_state_dict(serving_weights(target))
    target.requires_grad_(False).eval()
    nextn = build_nextn(target.config, target, seed + 1)
    balancer = LoadBalancer(nextn)
    run = Run(work_dir / "nextn.pt", nextn, make_optimizers(nextn, muon_lr=0.02, adam_lr=0.003))
    if resume and run.path.exists():
        run.load()
    nextn.train()

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = make_batch(tokenizer, seed, _STEP_OFFSET + step, tokens_per_step)
        row_len = batch.tokens.shape[1]
        loss = torch.zeros(())
        figures: dict[str, float] = {}
        reached: torch.Tensor | None = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                hidden = target.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
                embedded = target.model.embed_tokens(batch.tokens)
            drafted = draft_steps(nextn, target.model.rotary_emb, embedded, hidden, NUM_DRAFT_STEPS)
            for j, state in enumerate(drafted, start=1):
                last = row_len - j - 1  # entry i guesses token i + j + 1, so entries 0 .. last - 1 have a label
                learnt = batch.weights[:, j + 1 :] == 1.0
                tokens = batch.tokens[:, j + 1 :][learnt]
                with torch.no_grad():
                    target_logits = target.lm_head(hidden[:, j : j + last][learnt])
                step_loss, accepted = draft_loss(target.lm_head(state[:, :last][learnt]), target_logits, tokens)
                loss = loss + step_loss / NUM_DRAFT_STEPS
                figures[f"accept_{j}"] = round(accepted.float().mean().item(), 4)
                chain = torch.zeros(learnt.shape, dtype=torch.bool).masked_scatter(learnt, accepted)
                reached = chain if reached is None else reached[:, :last] & chain
                figures[f"chain_{j}"] = round((reached.sum() / learnt.sum()).item(), 4)
        return loss, figures

    def after_step(progress: float) -> dict[str, float]:
        return {"max_load": round(balancer.update(0.01 * (1.0 - progress) + 0.0005), 2)}

    run.train(budget, loss_at, after_step, stop_after_steps=stop_after_steps)
    return nextn
