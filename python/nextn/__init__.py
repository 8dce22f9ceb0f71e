"""nextn: an inference server for GLM-4.x Mixture-of-Experts models that draft their own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nextn.llm import LLM, GenerationOutput, SamplingParams

__all__ = ["LLM", "GenerationOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the offline API on first use, so that ``import nextn`` stays light (PEP 562)."""
    if name in ("LLM", "GenerationOutput", "SamplingParams"):
        from nextn import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'nextn' has no attribute {name!r}")
