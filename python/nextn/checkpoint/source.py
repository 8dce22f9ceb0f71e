"""One checkpoint folder: what its config says, what quantization it declares, which tensors it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nextn.checkpoint.fit import check_extent
from nextn.checkpoint.header import TensorInfo
from nextn.checkpoint.hub import resolve_draft, resolve_model
from nextn.checkpoint.ignores import check_ignores
from nextn.checkpoint.index import CheckpointIndex
from nextn.checkpoint.layout import nextn_prefix
from nextn.config.model_config import ModelConfig
from nextn.quantization.detect import detect_quantization
from nextn.quantization.scheme import QuantizationConfig


@dataclass(frozen=True)
class Source:
    """quantization: as declared, None where nothing is; index: None for dummy weights."""

    folder: Path
    config: ModelConfig
    quantization: QuantizationConfig | None
    index: CheckpointIndex | None

    @classmethod
    def open(cls, name: str, *, flag: str, dummy: bool, has_target: bool = True) -> Source:
        """Read config.json and the files' headers.

        flag: what the name was given with, for messages; has_target: False if only the NextN layer is taken
        Raises ConfigError, CheckpointError or QuantizationError.
        """
        folder = resolve_model(name, flag) if has_target else resolve_draft(name, flag)
        config = ModelConfig.from_pretrained(folder)
        quantization = detect_quantization(folder, config.quantization_config)
        if dummy:
            return cls(folder, config, quantization, None)
        index = CheckpointIndex.open(folder, "" if has_target else nextn_prefix(config))
        if has_target:
            check_extent(index, config)
        check_ignores(quantization, config, index.tensors, has_target=has_target)
        return cls(folder, config, quantization, index)

    @property
    def draft_prefix(self) -> str:
        return nextn_prefix(self.config)

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        return self.index.dtypes if self.index is not None else {}

    @property
    def draft_tensors(self) -> Mapping[str, TensorInfo]:
        """The NextN layer's."""
        tensors = self.index.tensors if self.index is not None else {}
        return {name: info for name, info in tensors.items() if name.startswith(self.draft_prefix)}

    @property
    def target_tensors(self) -> Mapping[str, TensorInfo]:
        """All others."""
        tensors = self.index.tensors if self.index is not None else {}
        return {name: info for name, info in tensors.items() if not name.startswith(self.draft_prefix)}
