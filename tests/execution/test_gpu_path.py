"""The model and the engine as they are on a GPU: weights as stored, every kernel in Triton, decode steps on the device.

Without a GPU Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.execution.engine import Engine
from nextn.execution.memory import make_kv_cache
from nextn.kernels import gpu
from nextn.kernels.linear import StoredWeight
from nextn.kernels.moe_combine import ExpertTerms
from nextn.layers import moe
from nextn.layers.attention import Attention
from nextn.layers.batch import make_extend_batch
from nextn.text.grammar import regex_form

from tests import checkpoints
from tests.checkpoints import (
    END_OF_LETTERS,
    Quant,
    State,
    said_in_letters,
    tiny_config,
    write_checkpoint,
    write_letters,
)
from tests.conftest import request, run_all, run_outputs

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
CONFIG = tiny_config(
    vocab_size=40,
    eos_token_id=[END_OF_LETTERS],
    num_hidden_layers=3,  # the second and third sum up the experts of the one before
    head_dim=32,  # as wide as heads are that attention quantizes
    max_position_embeddings=256,
    moe_intermediate_size=32,
    intermediate_size=96,
    n_routed_experts=3,
    num_experts_per_tok=3,  # an expert chosen by a hair would differ from run to run
)
QUANTS: list[Quant] = ["none", "channel", "tensor", "block", "ct_block"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Blocks are as wide as the kernels for GPUs take them: as a head of attention, and wider than that."""
    found: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        for quant in QUANTS:
            patch.setattr(checkpoints, "BLOCK", (64, 64) if quant == "ct_block" else (32, 32))
            found[quant] = write_checkpoint(tmp_path_factory.mktemp(quant), CONFIG, quant=quant)
    return found


def _load(folder: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(folder), **options)
    return load_model(config, device=device, dtype=dtype, want_draft=True)


def _logits(loaded: LoadedModel, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two sequences' tokens, by the target and by the draft, in float32 on the CPU."""
    target, draft = loaded.target, loaded.draft
    assert draft is not None
    kv_cache = make_kv_cache(
        loaded.model_config, num_layers=4, num_pages=12, page_size=8, dtype=target.dtype, device=device
    )
    spans, tables = [(0, 21), (0, 5)], [[3, 1, 7], [5]]
    ids = torch.arange(26, device=device) * 7 % 40
    batch = make_extend_batch(spans, tables, 8, device)
    hidden = target.forward(ids, batch, kv_cache)
    draft_batch = make_extend_batch(spans, tables, 8, device, first_key=0)
    drafted = draft.forward(ids.roll(-1), hidden, draft_batch, kv_cache)
    return target.compute_logits(hidden).cpu(), draft.compute_logits(drafted).cpu()


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of most rows; a few differ more, where an expert was chosen by a hair."""
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).median())


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_are_those_of_the_cpu(folders: dict[str, Path], quant: Quant, request: pytest.FixtureRequest) -> None:
    """bfloat16 has 8 bits and FP8 activations have 4, which these three narrow layers hardly average out."""
    exact = _logits(_load(folders[quant], CPU, torch.float32), CPU)
    device = request.getfixturevalue("device")
    loaded = _load(folders[quant], device, torch.bfloat16)
    linear = loaded.target.layers[1].self_attn.qkv_proj.packed
    assert isinstance(linear, StoredWeight)
    assert (linear.weight.dtype == torch.float8_e4m3fn) == (quant != "none")
    for got, expected in zip(_logits(loaded, device), exact, strict=True):
        assert _error(got, expected) < (0.02 if quant == "none" else 0.12)


@pytest.mark.parametrize("quant", ["channel", "ct_block"])
def test_where_only_weights_are_quantized_activations_stay_wide(
    quant: Quant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What is lost is bfloat16's roundings."""

    def weights_only(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    monkeypatch.setattr(checkpoints, "BLOCK", (32, 32))
    folder = write_checkpoint(tmp_path, CONFIG, quant=quant, mutate_config=weights_only)
    exact = _logits(_load(folder, CPU, torch.float32, draft_head="stored"), CPU)
    device = request.getfixturevalue("device")
    loaded = _load(folder, device, torch.bfloat16, draft_head="stored")
    assert any("weights only" in one.source for one in loaded.report.target)
    for got, expected in zip(_logits(loaded, device), exact, strict=True):
        assert _error(got, expected) < 0.02


def test_a_dropped_scale_would_show(folders: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    exact = _logits(_load(folders["channel"], CPU, torch.float32), CPU)

    def spoil(state: State) -> None:
        state["model.layers.1.mlp.experts.2.down_proj.weight_scale"][:] = 1.0

    spoilt = write_checkpoint(tmp_path, CONFIG, quant="channel", mutate=spoil)
    device = request.getfixturevalue("device")
    got, _ = _logits(_load(spoilt, device, torch.bfloat16), device)
    assert _error(got, exact[0]) > 0.3


def test_experts_terms_are_let_go_before_the_next_layer_computes(
    folders: dict[str, Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine rows a token: of a prompt they take more memory than anything else."""
    made: list[weakref.ref[torch.Tensor]] = []
    make, attend = moe.expert_terms, Attention.forward

    def noting(*arguments: Any, **options: Any) -> ExpertTerms:
        terms = make(*arguments, **options)
        made.append(weakref.ref(terms.pairs))
        return terms

    def attending(*arguments: Any, **options: Any) -> torch.Tensor:
        assert all(pairs() is None for pairs in made)
        return attend(*arguments, **options)

    monkeypatch.setattr(moe, "expert_terms", noting)
    monkeypatch.setattr(Attention, "forward", attending)
    _logits(_load(folders["channel"], device, torch.bfloat16), device)
    assert len(made) == 3, "two of the target's layers, and the draft's"


def _engine(folder: Path, **options: object) -> Engine:
    defaults = {
        "dtype": "bfloat16",
        "decode_on_device": True,
        "max_running_requests": 4,
        "canary": "off",
        "page_size": 4,
    }
    return Engine(EngineConfig(model_path=str(folder), **{**defaults, **options}))  # type: ignore[arg-type]


PROMPTS = [[3, 9, 1, 22, 7, 7], [30, 2]]


def test_a_grammar_holds_beside_sequences_that_draft(
    folders: dict[str, Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "num_processors", lambda device: 2)
    grammar = regex_form("[ab][0-9]{3}!", "regex", str).as_grammar()
    held = [request(str(i), prompt, 8, grammar=grammar, ignore_eos=False) for i, prompt in enumerate(PROMPTS)]
    engine = _engine(write_letters(folders["channel"]), num_draft_steps=2)
    engine.add(request("free", [4, 4, 8], 6))
    outputs = run_outputs(engine, held, known=["free"])
    for one in held:
        said = said_in_letters([token for output in outputs[one.rid] for token in output.token_ids])
        assert re.fullmatch("[ab][0-9]{3}!", said)
    assert sum(engine.stats().drafted_per_position) > 0
    assert outputs["free"][-1].completion_tokens == 6


@pytest.mark.parametrize(("quant", "kv_cache_dtype"), [("channel", "fp8_e4m3"), ("block", "auto")])
def test_without_dependence_on_the_batch_drafts_change_nothing(
    folders: dict[str, Path], quant: Quant, kv_cache_dtype: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "num_processors", lambda device: 2)  # fewer programs to interpret
    requests = [request(str(i), prompt, max_new_tokens=4) for i, prompt in enumerate(PROMPTS)]
    options = {"batch_invariant": True, "kv_cache_dtype": kv_cache_dtype}
    alone = _engine(folders[quant], num_draft_steps=0, **options)
    expected = {rid: tokens for one in requests for rid, tokens in run_all(alone, [one]).items()}
    drafting = _engine(folders[quant], num_draft_steps=2, **options)
    assert run_all(drafting, requests) == expected
    assert drafting.stats().num_verify_passes > 0
