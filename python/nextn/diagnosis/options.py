"""The doctor's command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextn.config.engine_config import EngineConfig
from nextn.config.server_args import ServerArgs

DEFAULT_GPU_GB = 141.0
FLAGS = (
    "quantization",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_quantization",
    "speculative_draft_head",
)
"""The server's flags that change what is loaded; the doctor takes them with the server's meaning."""


@dataclass(frozen=True)
class DoctorOptions:
    """checkpoint: folder or hub name, None for the embedded model; server: FLAGS, as they were given."""

    checkpoint: str | None
    server: dict[str, str]
    deep: bool = False
    gpu_gb: float = DEFAULT_GPU_GB
    as_json: bool = False
    plot: Path | None = None

    def engine_config(self, model_path: str) -> EngineConfig:
        """As the server would make it. Raises ConfigError."""
        return ServerArgs(model_path=model_path, **self.server).engine_config(model_path)  # type: ignore[arg-type]


def parse_options(argv: Sequence[str] | None = None) -> DoctorOptions:
    """``--help`` and wrong arguments print and exit."""
    parser = argparse.ArgumentParser(
        prog="python -m nextn.doctor",
        description="Says whether a checkpoint will serve and draft, in which precision and why, what other servers "
        "get wrong with it, and what memory it takes. Without --deep, reads config.json and safetensors headers only.",
        epilog="Exit code: 0 fine, 1 serves but does not draft well, 2 is refused, on GPUs at least.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", nargs="?", help="folder or hub name; default: the embedded model")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also read scales, norms, biases and the first rows of weights (downloads a hub name)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=_gigabytes,
        default=DEFAULT_GPU_GB,
        metavar="GB",
        dest="gpu_gb",
        help="of one GPU, in gigabytes (10^9 bytes); default: %(default)g",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="picture of the memory by part")
    for name in FLAGS:
        parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help="as the server's flag")
    found = parser.parse_args(argv)
    server = {name: value for name in FLAGS if (value := getattr(found, name)) is not None}
    return DoctorOptions(found.checkpoint, server, found.deep, found.gpu_gb, found.as_json, found.plot)


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, expected gigabytes (10^9 bytes) above 0")
    return value
