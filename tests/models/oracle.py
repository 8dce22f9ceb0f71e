"""transformers' Glm4Moe, and a NextN layer written out from its parts, as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm

from tests.checkpoints import State, write_checkpoint


def transformers_model(folder: Path, config: dict[str, Any], state: State) -> Glm4MoeForCausalLM:
    """Write float32 weights to disk and let transformers load them its own way."""
    kept = {name: t for name, t in state.items() if f".layers.{config['num_hidden_layers']}." not in name}
    plain = {**config, "num_nextn_predict_layers": 0, "dtype": "float32"}
    write_checkpoint(folder, plain, state=kept, dtype=torch.float32)
    model = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


class NextNReference(nn.Module):
    """x = eh_proj([enorm(embed), hnorm(h)]), a decoder layer, shared_head.norm; transformers' parts throughout."""

    def __init__(self, target: Glm4MoeForCausalLM, state: State) -> None:
        super().__init__()
        config: Glm4MoeConfig = target.config
        index = config.num_hidden_layers
        prefix = f"model.layers.{index}."
        mine = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        self.target = target
        self.layer = Glm4MoeDecoderLayer(config, index).eval()
        experts = range(config.n_routed_experts)
        fused = {
            "mlp.experts.gate_up_proj": torch.stack(
                [
                    torch.cat(
                        [mine.pop(f"mlp.experts.{e}.gate_proj.weight"), mine.pop(f"mlp.experts.{e}.up_proj.weight")]
                    )
                    for e in experts
                ]
            ),
            "mlp.experts.down_proj": torch.stack([mine.pop(f"mlp.experts.{e}.down_proj.weight") for e in experts]),
        }
        self.norms = nn.ModuleDict()
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm = Glm4MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
            norm.weight.data.copy_(mine.pop(f"{name}.weight"))
            self.norms[name.replace(".", "_")] = norm
        self.eh_proj = mine.pop("eh_proj.weight")
        own_embedding, own_head = mine.pop("embed_tokens.weight", None), mine.pop("shared_head.head.weight", None)
        self.embedding = own_embedding if own_embedding is not None else target.model.embed_tokens.weight
        self.head = own_head if own_head is not None else target.lm_head.weight
        self.layer.load_state_dict({**mine, **fused})

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A whole sequence at once: ids [T], hidden [T, H], positions [T]. Returns h' [T, H]."""
        embedded = self.norms["enorm"](self.embedding[ids])
        x = torch.cat([embedded, self.norms["hnorm"](hidden)], -1) @ self.eh_proj.t()
        x = x[None]
        length = len(ids)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        rotary = self.target.model.rotary_emb(x, position_ids=positions[None])
        out = self.layer(x, attention_mask=mask, position_ids=positions[None], position_embeddings=rotary)
        out = out[0] if isinstance(out, tuple) else out
        return self.norms["shared_head_norm"](out[0] if out.dim() == 3 else out)
