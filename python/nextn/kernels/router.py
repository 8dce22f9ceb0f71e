"""Expert selection of GLM-4.x: sigmoid scores, a bias that steers the choice but not the weights, groups.

Floor: the gate's weight [E, H] in float32, read once; at small batches limited by launches.
"""

from __future__ import annotations

import torch

from nextn.kernels import native
from nextn.kernels.linear import PackedWeight, linear


def route(
    x: torch.Tensor,
    gate: PackedWeight,
    correction_bias: torch.Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights, all in float32 (DeepSeek-V3, section 2.1.2; auxiliary-loss-free balancing).

    The choice maximises sigmoid(x · gate) + bias, within the topk_group groups whose two best experts score highest in
    sum. The weights are the chosen experts' unbiased scores, divided by their sum if norm_topk_prob, times the factor.

    x: [T, H]; gate: [E, H] float32; correction_bias: [E] float32
    Returns weights [T, top_k] float32 and expert ids [T, top_k] int64.
    """
    if gate.address and native.cpu is not None and native.suits(x):
        weights = x.new_empty(x.shape[0], top_k)
        ids = torch.empty(x.shape[0], top_k, dtype=torch.int64)
        native.cpu.route(
            gate.address,
            correction_bias.data_ptr(),
            x.data_ptr(),
            x.shape[0],
            top_k,
            n_group,
            topk_group,
            norm_topk_prob,
            routed_scaling_factor,
            weights.data_ptr(),
            ids.data_ptr(),
        )
        return weights, ids
    scores = linear(x.float(), gate).sigmoid_()
    biased = scores + correction_bias
    if n_group > 1:
        grouped = biased.view(x.shape[0], n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(topk_group, dim=-1, sorted=False).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        biased = grouped.masked_fill(outside[:, :, None], float("-inf")).view(x.shape[0], -1)
    ids = biased.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids
