"""A card that Triton takes for present, so that kernels are compiled for it on any machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that one program can have, by compute capability."""


@dataclass(frozen=True)
class Card:
    """Stands where Triton asks for the card that is there: ``triton.runtime.driver.set_active(Card(90))``."""

    capability: int
    num_processors: int = 132
    signatures: list[str] = field(default_factory=list, compare=False)
    """Of the kernels that something was made to launch."""

    @property
    def utils(self) -> Any:
        properties = {"multiprocessor_count": self.num_processors, "max_shared_mem": SHARED_MEMORY[self.capability]}
        return SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        self.signatures.append(str(source.signature))
