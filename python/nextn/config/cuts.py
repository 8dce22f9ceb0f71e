"""How a model is cut over ranks (Shoeybi et al., 2019, "Megatron-LM"): which heads, rows and columns each one holds.

Attention is cut by heads, MLPs and experts by their intermediate size, the output head by its vocabulary. A cut through
quantized weights falls on block boundaries, so that each rank's scales are some of the checkpoint's own; the shares may
then differ by one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from nextn.config.model_config import ModelConfig
from nextn.errors import ConfigError

CUT_UNIT = 16
"""Where no block says otherwise, shares are multiples of this: rows of that many bytes are read in whole vectors."""


def why_not(config: ModelConfig, tp_size: int) -> str | None:
    """Why the model's heads cannot be cut over ``tp_size`` ranks; None if they can."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tp_size:
        return f"{heads} heads do not divide by {tp_size}"
    if kv_heads % tp_size and tp_size % kv_heads:
        return f"{kv_heads} KV heads neither divide by {tp_size} nor into it"
    return None


def check_cut(config: ModelConfig, tp_size: int) -> None:
    """Raises ConfigError, naming the sizes that would do, if the heads cannot be cut over ``tp_size`` ranks."""
    if (reason := why_not(config, tp_size)) is not None:
        sizes = [n for n in range(1, config.num_attention_heads + 1) if why_not(config, n) is None]
        raise ConfigError(f"--tp-size {tp_size}: {reason}; choose one of {', '.join(map(str, sizes))}")


def heads_of(config: ModelConfig, tp_size: int, rank: int) -> tuple[range, range]:
    """A rank's query heads and KV heads. With more ranks than KV heads, several hold the same one."""
    num_heads, kv_heads = config.num_attention_heads // tp_size, config.num_key_value_heads
    first = rank * kv_heads // tp_size
    return range(rank * num_heads, (rank + 1) * num_heads), range(first, first + num_kv_heads_of(config, tp_size))


def num_kv_heads_of(config: ModelConfig, tp_size: int) -> int:
    """KV heads that each rank holds."""
    return max(config.num_key_value_heads // tp_size, 1)


def cut_unit(blocks: Iterable[int | None]) -> int:
    """What shares are multiples of. blocks: along the cut, of each matrix that is cut there; None without one."""
    return math.lcm(*[block for block in blocks if block is not None]) if any(blocks) else CUT_UNIT


def share_of(name: str, size: int, unit: int, tp_size: int, rank: int) -> range:
    """A rank's share of ``size`` rows or columns, as even as multiples of ``unit`` allow.

    Raises ConfigError if some rank would have none. name: what is cut, for the message
    """
    if tp_size == 1:
        return range(size)
    num_units = -(-size // unit)
    if num_units < tp_size:
        raise ConfigError(
            f"--tp-size {tp_size}: {name}: {size} is cut in multiples of {unit}, which makes {num_units} pieces; "
            f"choose --tp-size {num_units} or less"
        )
    return range(rank * num_units // tp_size * unit, min((rank + 1) * num_units // tp_size * unit, size))


def vocabulary_of(vocab_size: int, tp_size: int, rank: int) -> range:
    """The tokens whose logits a rank computes; only the last ranks may have fewer than the others."""
    num_each = -(-vocab_size // tp_size)
    return range(min(rank * num_each, vocab_size), min((rank + 1) * num_each, vocab_size))
