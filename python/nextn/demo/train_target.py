"""Stage: train the target on the corpus."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Glm4MoeForCausalLM

from nextn.demo.modeling import LoadBalancer, build_target, model_config
from nextn.demo.optim import make_optimizers
from nextn.demo.packing import make_batch
from nextn.demo.tokenizer import EOS_TOKENS
from nextn.demo.training import Budget, Run

TOKENS_PER_STEP = 6144


def new_target(tokenizer: Tokenizer, seed: int) -> Glm4MoeForCausalLM:
    eos = [token for token in map(tokenizer.token_to_id, EOS_TOKENS) if token is not None]
    return build_target(model_config(eos, eos[0]), seed)


def train_target(
    tokenizer: Tokenizer,
    work_dir: Path,
    budget: Budget,
    seed: int,
    resume: bool,
    tokens_per_step: int = TOKENS_PER_STEP,
    stop_after_steps: int | None = None,
) -> Glm4MoeForCausalLM:
    """Train in bfloat16 autocast over float32 weights; state goes to `work_dir/target.pt`."""
    model = new_target(tokenizer, seed)
    balancer = LoadBalancer(model)
    run = Run(work_dir / "target.pt", model, make_optimizers(model, muon_lr=0.02, adam_lr=0.003))
    if resume and run.path.exists():
        run.load()
    model.train()

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = make_batch(tokenizer, seed, step, tokens_per_step)
        targets, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        kept = weights.nonzero().squeeze(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1].flatten(0, 1).index_select(0, kept))
        losses = F.cross_entropy(logits.float(), targets[kept], reduction="none")
        weights = weights[kept]
        learnt = weights == 1.0
        right = (logits.detach()[learnt].argmax(-1) == targets[kept][learnt]).float().mean().item()
        return (losses * weights).sum() / weights.sum(), {"accuracy": round(right, 4)}

    def after_step(progress: float) -> dict[str, float]:
        return {"max_load": round(balancer.update(0.01 * (1.0 - progress) + 0.0005), 2)}

    run.train(budget, loss_at, after_step, stop_after_steps=stop_after_steps)
    return model
