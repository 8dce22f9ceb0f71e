"""Compile a checkpoint's kernels ahead, as at the start of a server, for a card that is not there.

Prints how many were compiled, and how many were found compiled. A program of its own, because kernels that are defined
for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from typing import Any

import torch
import triton
from nextn.checkpoint import loader
from nextn.config.engine_config import EngineConfig
from nextn.distributed.parallel import SINGLE
from nextn.execution import shard
from nextn.execution.compiling import META
from nextn.execution.memory import make_kv_cache
from nextn.layers.kv_cache import KVCache

from tests.card import Card

CONTEXT, CHUNK, MAX_DRAFTS = 32, 2, 1


def main(folder: str, arch: int) -> dict[str, int]:
    """arch: the card's compute capability, such as 90."""
    card = Card(arch)
    triton.runtime.driver.set_active(card)
    counts: Counter[str] = Counter(compiled=0, found=0)

    def count(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        counts["found" if cache_hit else "compiled"] += 1

    triton.knobs.compilation.listener = count
    loader._fill = lambda *arguments, **options: None  # type: ignore[assignment] # there are no values to write
    config = EngineConfig(model_path=folder, max_running_requests=2, num_draft_steps=None)
    loaded = loader.load_model(config, device=META, dtype=torch.bfloat16, want_draft=True)

    def kv_cache_of(num_pages: int, device: torch.device = META) -> KVCache:
        return make_kv_cache(
            loaded.model_config,
            num_layers=loaded.model_config.num_hidden_layers + 1,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=torch.bfloat16,
            device=device,
        )

    shard._compile_ahead(config, loaded, kv_cache_of, CHUNK, CONTEXT, MAX_DRAFTS, SINGLE)
    kept = [
        kernel
        for function in gc.get_objects()
        if isinstance(function, triton.JITFunction)
        for kernels, *_ in function.device_caches.values()
        for kernel in kernels.values()
    ]
    assert kept, "what is compiled is at hand for launches"
    assert not any(isinstance(kernel, triton.FutureKernel) for kernel in kept), "and is what a launch takes"
    assert sorted(card.signatures) == sorted({str(kernel.src.signature) for kernel in kept}), "and can be launched"
    return dict(counts)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
