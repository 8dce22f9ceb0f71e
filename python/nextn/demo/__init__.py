"""The embedded model: a small trained GLM-4 MoE checkpoint that ships with the package, and the code that made it."""

from pathlib import Path


def checkpoint_dir() -> Path:
    """The folder of the embedded checkpoint, in the layout of the published FP8 ones."""
    return Path(__file__).parent / "checkpoint"
