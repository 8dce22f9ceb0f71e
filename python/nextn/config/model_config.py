"""config.json of a GLM-4.x MoE checkpoint as typed fields."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextn.errors import ConfigError

ARCHITECTURE = "Glm4MoeForCausalLM"
MODEL_TYPE = "glm4_moe"
ONLY = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""Fields with one value that is served, which most files leave out."""
MOST = {"num_hidden_layers": 4096, "n_routed_experts": 65536, "head_dim": 65536, "max_position_embeddings": 2**24}
"""Bounds that no model comes near, so that a broken config.json cannot ask for endless lists and tables."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GLM-4.5/4.6/4.7 MoE model (GLM-4.5 technical report, 2025; names as in the published files).

    first_k_dense_replace: layers 0 … this - 1 have a dense MLP, the others experts
    n_group, topk_group: experts stand in n_group groups, of which the best topk_group may be chosen from
    partial_rotary_factor: share of head_dim that is rotated
    num_nextn_predict_layers: 1 if layer ``num_hidden_layers`` of the checkpoint is a NextN layer
    dtype: name of the type that unquantized tensors are stored in
    quantization_config: the raw dict, under whichever name it stands
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    use_qk_norm: bool
    attention_bias: bool
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    quantization_config: Mapping[str, Any] | None = None

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read ``config.json`` of a checkpoint folder; eos ids of ``generation_config.json`` are added.

        Raises ConfigError if a file cannot be read or a field is missing, of the wrong type, or not supported.
        """
        folder = Path(path)
        raw = _read_json(folder / "config.json")
        config = cls.from_dict(raw, where=str(folder / "config.json"))
        generation = folder / "generation_config.json"
        if not os.path.lexists(generation):
            return config
        more = _token_ids(_read_json(generation).get("eos_token_id"), str(generation))
        merged = tuple(dict.fromkeys((*config.eos_token_ids, *more)))
        return cls(**{**config.__dict__, "eos_token_ids": merged})

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Check and convert the values of a config.json. ``where`` stands in error messages."""
        read = _Reader(raw, where)
        read.check_supported()
        heads = read.integer("num_attention_heads")
        hidden = read.integer("hidden_size")
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size"),
            moe_intermediate_size=read.integer("moe_intermediate_size"),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.integer("num_key_value_heads"),
            head_dim=read.integer("head_dim", hidden // max(heads, 1)),
            n_routed_experts=read.integer("n_routed_experts"),
            n_shared_experts=read.integer("n_shared_experts", least=0),
            num_experts_per_tok=read.integer("num_experts_per_tok"),
            first_k_dense_replace=read.integer("first_k_dense_replace", least=0),
            n_group=read.integer("n_group", 1),
            topk_group=read.integer("topk_group", 1),
            routed_scaling_factor=read.number("routed_scaling_factor"),
            norm_topk_prob=read.boolean("norm_topk_prob"),
            use_qk_norm=read.boolean("use_qk_norm", False),
            attention_bias=read.boolean("attention_bias"),
            partial_rotary_factor=read.rotary_number("partial_rotary_factor"),
            rope_theta=read.rotary_number("rope_theta"),
            rms_norm_eps=read.number("rms_norm_eps"),
            max_position_embeddings=read.integer("max_position_embeddings"),
            tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            num_nextn_predict_layers=read.integer("num_nextn_predict_layers", 0, least=0),
            eos_token_ids=_token_ids(raw.get("eos_token_id"), where),
            dtype=read.dtype(),
            quantization_config=raw.get("quantization_config") or raw.get("compression_config"),
        )
        _check_shape(config, where)
        return config


class _Reader:
    """Typed access to a raw config that names the field, what was found, and what was expected."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where

    def check_supported(self) -> None:
        architectures = self._raw.get("architectures") or []
        if not isinstance(architectures, list):
            raise ConfigError(f"{self._where}: architectures: found {architectures!r}, expected [{ARCHITECTURE!r}]")
        if self._raw.get("model_type", MODEL_TYPE) != MODEL_TYPE or (
            architectures and ARCHITECTURE not in architectures
        ):
            found = ", ".join(map(str, architectures)) or self._raw.get("model_type")
            raise ConfigError(
                f"{self._where}: architecture {found} is not supported; expected {ARCHITECTURE} (GLM-4.5, 4.6, 4.7)"
            )
        if not architectures and "model_type" not in self._raw:
            raise ConfigError(f"{self._where}: names no architecture; expected architectures: [{ARCHITECTURE!r}]")
        for name, expected in ONLY.items():
            if (found := self._raw.get(name)) not in (None, expected):
                raise ConfigError(f"{self._where}: {name}: found {found!r}, expected {expected!r}")
        window = self._raw.get("sliding_window")
        if window is not None and self._raw.get("use_sliding_window") is not False:
            raise ConfigError(
                f"{self._where}: sliding_window: found {window!r}, expected none: attention reaches back to the first "
                "token"
            )
        for name in ("rope_parameters", "rope_scaling"):
            self._check_rope(name)

    def _check_rope(self, name: str) -> None:
        """Raises ConfigError if positions are scaled. The type's key was "type" in older files."""
        rope = self._raw.get(name) or {}
        kinds = [rope[key] for key in ("rope_type", "type") if key in rope] if isinstance(rope, Mapping) else [rope]
        for kind in kinds:
            if kind != "default":
                raise ConfigError(
                    f"{self._where}: {name}: rope type {kind!r} is not supported; expected 'default' (no scaling)"
                )
        if not kinds and "factor" in rope:
            raise ConfigError(
                f"{self._where}: {name}: found a factor of {rope['factor']!r} without a type, expected 'default' (no "
                "scaling); remove the factor"
            )

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._raw.get(name) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._where}: {name}: found {value!r}, expected an object")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{self._where}: {name}: found {value!r}, expected a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{self._where}: {name}: found {value!r}, expected a number above 0")
        return float(value)

    def rotary_number(self, name: str) -> float:
        """A field of its own in older files, one of rope_parameters in newer ones."""
        apart, nested = self._raw.get(name), self.mapping("rope_parameters").get(name)
        if apart is not None and nested is not None and apart != nested:
            raise ConfigError(
                f"{self._where}: {name}: found {apart!r}, and {nested!r} in rope_parameters; remove the wrong one"
            )
        return self.number(name, nested)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: {name}: found {value!r}, expected true or false")
        return value

    def dtype(self) -> str:
        value = self._raw.get("dtype") or self._raw.get("torch_dtype") or "bfloat16"
        if value not in ("bfloat16", "float16", "float32"):
            raise ConfigError(f"{self._where}: dtype: found {value!r}, expected 'bfloat16', 'float16' or 'float32'")
        return str(value)

    def _get(self, name: str, default: Any) -> Any:
        value = self._raw.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self._where}: {name} is missing; a wrong guess would corrupt the output, so add it")
        return value


def _check_shape(config: ModelConfig, where: str) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(f"{where}: {message}")

    for name, most in MOST.items():
        require(getattr(config, name) <= most, f"{name}: found {getattr(config, name)}, expected at most {most}")
    require(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"num_attention_heads: found {config.num_attention_heads}, expected a multiple of num_key_value_heads "
        f"({config.num_key_value_heads})",
    )
    require(
        config.n_routed_experts % config.n_group == 0,
        f"n_group: found {config.n_group}, expected a divisor of n_routed_experts ({config.n_routed_experts})",
    )
    require(
        config.topk_group <= config.n_group,
        f"topk_group: found {config.topk_group}, expected at most n_group ({config.n_group})",
    )
    choosable = config.n_routed_experts // config.n_group * config.topk_group
    require(
        config.num_experts_per_tok <= choosable,
        f"num_experts_per_tok: found {config.num_experts_per_tok}, expected at most {choosable}, "
        "the experts in topk_group groups",
    )
    require(
        0 < config.rotary_dim <= config.head_dim and config.rotary_dim % 2 == 0,
        f"partial_rotary_factor: {config.partial_rotary_factor} of head_dim {config.head_dim} rotates "
        f"{config.rotary_dim} dimensions; expected an even number from 2 to head_dim",
    )
    require(
        config.num_nextn_predict_layers <= 1,
        f"num_nextn_predict_layers: found {config.num_nextn_predict_layers}, expected 0 or 1",
    )


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{where}: eos_token_id: found {value!r}, expected a token id or a list of them")
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {path.readlink()}, which does not exist; download it again"
            ) from None
        raise ConfigError(
            f"{path} does not exist; give a folder that holds a checkpoint in Hugging Face layout"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: found {type(raw).__name__}, expected a JSON object")
    return raw
