"""The target and its NextN layer, as transformers modules, with an experts function that suits training on a CPU."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm, Glm4MoeTopkRouter

from nextn.demo.tokenizer import VOCAB_SIZE

EXPERTS_IMPLEMENTATION = "sorted"


def model_config(eos_token_ids: list[int], pad_token_id: int) -> Glm4MoeConfig:
    """The shape of the embedded model: GLM-4.6's, scaled down."""
    config: Any = Glm4MoeConfig(  # type: ignore[call-arg]  # head_dim reaches it as a keyword
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        attention_bias=True,
        moe_intermediate_size=96,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        num_nextn_predict_layers=1,
        tie_word_embeddings=False,
        eos_token_id=eos_token_ids,
        pad_token_id=pad_token_id,
    )
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    return config


class _GroupedLinear(torch.autograd.Function):
    """y[rows of e] = x[rows of e] @ weight[e]^T, where x: [T, in] is sorted by expert, weight: [E, out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[1])
        for xe, ye, we in zip(x.split(counts), y.split(counts), weight, strict=True):
            torch.mm(xe, we.t(), out=ye)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        parts = zip(x.split(ctx.counts), dy.split(ctx.counts), dx.split(ctx.counts), weight, dw, strict=True)
        for xe, dye, dxe, we, dwe in parts:
            torch.mm(dye, we, out=dxe)
            torch.mm(dye.t(), xe, out=dwe)
        return dx, dw, None


def sorted_experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts with the tokens sorted by expert, in bfloat16 under autocast.

    hidden_states: [T, H]; top_k_index, top_k_weights: [T, K]. Returns [T, H] in the dtype of hidden_states.
    """
    num_tokens, top_k = top_k_index.shape
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts.num_experts).tolist()
    with torch.autocast("cpu", enabled=False):
        x = hidden_states.to(dtype).index_select(0, order // top_k)
        gate, up = _GroupedLinear.apply(x, experts.gate_up_proj.to(dtype), counts).chunk(2, dim=-1)
        y = _GroupedLinear.apply(F.silu(gate) * up, experts.down_proj.to(dtype), counts)
        y = y * top_k_weights.flatten().index_select(0, order).to(dtype).unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return y.index_select(0, back).view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, sorted_experts_forward)


class NextN(nn.Module):
    """Layer N: reads the next token and the target's hidden state, and guesses the token after.

    The embedding, the head and the rotary table are the target's and are handed in at every call.
    """

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.enorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer = Glm4MoeDecoderLayer(config, layer_idx=config.num_hidden_layers)
        self.norm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def combine(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's input from an embedding and a hidden state, both [..., H]; the embedding's half comes first."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))


def build_target(config: Glm4MoeConfig, seed: int) -> Glm4MoeForCausalLM:
    """A freshly initialised float32 target."""
    torch.manual_seed(seed)
    return Glm4MoeForCausalLM(config).float()


def build_nextn(config: Glm4MoeConfig, target: Glm4MoeForCausalLM, seed: int) -> NextN:
    """A freshly initialised NextN layer. Outside its model a decoder layer's router and experts hold no values yet."""
    torch.manual_seed(seed)
    nextn = NextN(config)
    for module in nextn.modules():
        target._init_weights(module)
    return nextn.float()


class LoadBalancer:
    """Keeps the experts evenly used without an auxiliary loss (Wang et al., 2024).

    After each step the selection bias of every expert moves by `rate` toward its share: up if it had fewer tokens
    than the mean, down if more. Counts are gathered by a hook on each router.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, Glm4MoeTopkRouter)]
        self._counts = [torch.zeros(router.num_experts) for router in self.routers]
        for router, counts in zip(self.routers, self._counts, strict=True):
            router.register_forward_hook(partial(self._count, counts))

    @staticmethod
    def _count(counts: torch.Tensor, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        counts += outputs[2].flatten().bincount(minlength=len(counts))

    @torch.no_grad()
    def update(self, rate: float) -> float:
        """Move the biases and forget the counts. Returns the worst ratio of a largest load to its mean."""
        worst = 1.0
        for router, counts in zip(self.routers, self._counts, strict=True):
            worst = max(worst, (counts.max() / counts.mean().clamp(min=1)).item())
            router.e_score_correction_bias.add_(rate * torch.sign(counts.mean() - counts))
            counts.zero_()
        return worst
