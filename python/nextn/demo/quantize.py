"""Trained tensors into the published files' form: names, FP8 codes with scales, and back again.

The form is compressed-tensors' `float-quantized`: weights e4m3 with one scale per output channel, activations
quantized at run time. Names are those of the official checkpoints, one 2-D tensor per expert and projection.
"""

import re

import torch

FP8_MAX = 448.0
Tensors = dict[str, torch.Tensor]

_QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(.+\.)?(gate|up|down)_proj)\.weight")
_KEPT_FLOAT32 = ("e_score_correction_bias", "weight_scale")


def is_quantized(name: str) -> bool:
    """Whether a checkpoint tensor is stored as FP8: attention, dense, routed and shared expert matrices."""
    return _QUANTIZED.fullmatch(name) is not None


def quantize_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: [out, in] float32. Returns codes [out, in] float8_e4m3fn and scales [out, 1] float32."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def dequantize_channels(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 weight that the codes stand for."""
    return codes.float() * scale.float()


def split_experts(tensors: Tensors) -> Tensors:
    """transformers' fused experts into one matrix per expert and projection.

    `X.experts.gate_up_proj` [E, 2I, H] holds the gate in rows 0..I and up in I..2I; `X.experts.down_proj` is [E, H, I].
    """
    split: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            for expert, (gate, up) in enumerate(tensor.unflatten(1, (2, -1)).unbind(0)):
                split[f"{prefix}.{expert}.gate_proj.weight"] = gate
                split[f"{prefix}.{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            split |= {f"{prefix}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor.unbind(0))}
        else:
            split[name] = tensor
    return split


def fuse_experts(tensors: Tensors) -> Tensors:
    """The inverse of `split_experts`."""
    pattern = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    fused: Tensors = {name: tensor for name, tensor in tensors.items() if not pattern.fullmatch(name)}
    groups: dict[str, int] = {}
    for name in tensors:
        if match := pattern.fullmatch(name):
            groups[match[1]] = max(groups.get(match[1], 0), int(match[2]) + 1)
    for prefix, num_experts in groups.items():
        parts = {
            kind: torch.stack([tensors[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(num_experts)])
            for kind in ("gate", "up", "down")
        }
        fused[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        fused[f"{prefix}.down_proj"] = parts["down"]
    return fused


def nextn_names(tensors: Tensors, layer: int) -> Tensors:
    """The NextN module's own names into those of layer N in a checkpoint."""
    prefix = f"model.layers.{layer}."
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("layer."):
            name = name.removeprefix("layer.")
        elif name == "norm.weight":
            name = "shared_head.norm.weight"
        renamed[prefix + name] = tensor
    return renamed


def module_names(tensors: Tensors, layer: int) -> Tensors:
    """The inverse of `nextn_names`."""
    prefix, renamed = f"model.layers.{layer}.", {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        if name == "shared_head.norm.weight":
            name = "norm.weight"
        elif not name.startswith(("eh_proj", "enorm", "hnorm")):
            name = "layer." + name
        renamed[name] = tensor
    return renamed


def compress(tensors: Tensors) -> Tensors:
    """Float32 tensors under checkpoint names (experts fused or not) into what a checkpoint file holds."""
    stored: Tensors = {}
    for name, tensor in sorted(split_experts(tensors).items()):
        tensor = tensor.detach().float()
        if is_quantized(name):
            stored[name], stored[f"{name}_scale"] = quantize_channels(tensor)
        else:
            stored[name] = tensor.clone() if name.endswith(_KEPT_FLOAT32) else tensor.bfloat16()
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def decompress(stored: Tensors) -> Tensors:
    """What a checkpoint file holds into the float32 tensors that a server computes with, experts fused."""
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_scale"):
            continue
        scale = stored.get(f"{name}_scale")
        tensors[name] = tensor.float() if scale is None else dequantize_channels(tensor, scale)
    return fuse_experts(tensors)


def ignore_list(names: list[str], layer: int) -> list[str]:
    """The modules that are not quantized, by checkpoint name, in the order of the official lists.

    names: all tensor names of the checkpoint. Layer N's optional embedding and head are listed although they are not
    in the files, as the official configurations do.
    """
    modules = {name.rsplit(".", 1)[0] for name in names if name.endswith(".weight") and not is_quantized(name)}
    modules |= {f"model.layers.{layer}.embed_tokens", f"model.layers.{layer}.shared_head.head"}

    def order(module: str) -> tuple[int, str]:
        match = re.match(r"model\.layers\.(\d+)\.", module)
        return (int(match[1]) if match else -1, module)

    return sorted(modules, key=order)
