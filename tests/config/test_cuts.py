"""How a model is cut over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nextn.config.cuts import check_cut, cut_unit, heads_of, share_of, vocabulary_of, why_not
from nextn.config.model_config import ModelConfig
from nextn.errors import ConfigError

from tests.checkpoints import tiny_config, write_checkpoint


def shares(size: int, unit: int, tp_size: int) -> list[range]:
    return [share_of("experts", size, unit, tp_size, rank) for rank in range(tp_size)]


@given(st.integers(1, 20000), st.integers(1, 256), st.integers(1, 64))
def test_shares_follow_each_other_on_unit_boundaries_and_differ_by_one_unit_at_most(
    size: int, unit: int, tp_size: int
) -> None:
    if -(-size // unit) < tp_size:
        with pytest.raises(ConfigError, match=rf"--tp-size {tp_size}: experts: {size} "):
            shares(size, unit, tp_size)
        return
    found = shares(size, unit, tp_size)
    assert [i for share in found for i in share] == list(range(size))
    assert all(share.start % unit == 0 and len(share) > 0 for share in found)
    units = [-(-len(share) // unit) for share in found]
    assert max(units) - min(units) <= 1


@given(st.integers(1, 300000), st.integers(1, 64))
def test_the_vocabulary_is_cut_into_equal_shares_but_for_the_last_ones(vocab_size: int, tp_size: int) -> None:
    found = [vocabulary_of(vocab_size, tp_size, rank) for rank in range(tp_size)]
    assert sum(map(len, found)) == vocab_size
    assert all(share.start == min(rank * len(found[0]), vocab_size) for rank, share in enumerate(found))


def test_published_sizes() -> None:
    assert {len(share) for share in shares(1536, 16, 8)} == {192}
    assert [len(share) for share in shares(1408, 128, 2)] == [640, 768]
    assert sorted({len(share) for share in shares(1536, 128, 8)}) == [128, 256]
    assert [len(share) for share in shares(10944, 128, 2)] == [5504, 5440], "the last block is half a block"
    with pytest.raises(ConfigError, match="choose --tp-size 11 or less"):
        shares(1408, 128, 16)


def test_a_cut_through_two_matrices_falls_on_the_blocks_of_both() -> None:
    assert cut_unit([None, None]) == 16
    assert cut_unit([128, None]) == 128
    assert cut_unit([128, 96]) == 384


def model(folder: Path, heads: int, kv_heads: int) -> ModelConfig:
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=kv_heads)
    return ModelConfig.from_pretrained(write_checkpoint(folder, config))


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(96, 8), (12, 2), (12, 6), (4, 4), (6, 1)])
def test_every_query_head_is_with_its_kv_head(tmp_path: Path, num_heads: int, kv_heads: int) -> None:
    config = model(tmp_path, num_heads, kv_heads)
    possible = [tp_size for tp_size in range(1, 97) if why_not(config, tp_size) is None]
    assert {1, num_heads} <= set(possible)
    for tp_size in possible:
        seen: list[int] = []
        for rank in range(tp_size):
            mine, of_kv = heads_of(config, tp_size, rank)
            seen += mine
            # The attention kernel spreads a rank's query heads over its KV heads evenly.
            found = [of_kv[i * len(of_kv) // len(mine)] for i in range(len(mine))]
            assert found == [head * kv_heads // num_heads for head in mine]
        assert seen == list(range(num_heads))


def test_heads_that_cannot_be_cut_are_refused_with_the_sizes_that_can(tmp_path: Path) -> None:
    config = model(tmp_path, 12, 2)
    with pytest.raises(ConfigError, match="--tp-size 5: 12 heads do not divide by 5; choose one of 1, 2, 4, 6, 12"):
        check_cut(config, 5)
    with pytest.raises(ConfigError, match="--tp-size 3: 2 KV heads neither divide by 3 nor into it"):
        check_cut(config, 3)
