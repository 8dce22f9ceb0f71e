"""Target and draft agree with transformers' implementation, over configs, chunkings and page layouts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from nextn.checkpoint.loader import LoadedModel, load_model
from nextn.config.engine_config import EngineConfig
from nextn.kernels import native
from nextn.layers.batch import make_extend_batch
from nextn.layers.kv_cache import KVCache

from tests.checkpoints import Quant, dequantized, quantized, random_state, tiny_config, write_checkpoint
from tests.models.oracle import NextNReference, transformers_model

PAGE_SIZE = 8
CPU = torch.device("cpu")
RELATIVE = 1e-4
"""Of the largest logit: float32 sums in another order differ by about 1e-6 per layer."""


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs on the compiled kernels and on their torch references."""
    if request.param == "torch":
        monkeypatch.setattr(native, "cpu", None)
    elif native.cpu is None:
        pytest.skip("the installation had no C compiler")


def load(folder: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(model_path=str(folder), **options)
    return load_model(config, device=CPU, dtype=torch.float32, want_draft=None)


class Runner:
    """Sequences on scattered pages, extended chunk by chunk."""

    def __init__(self, loaded: LoadedModel, num_seqs: int, seed: int) -> None:
        config = loaded.model_config
        pages_each = 512 // PAGE_SIZE
        order = list(range(num_seqs * pages_each))
        random.Random(seed).shuffle(order)
        self.pages = [order[i * pages_each : (i + 1) * pages_each] for i in range(num_seqs)]
        shape = (
            config.num_hidden_layers + 1,
            len(order),
            PAGE_SIZE,
            config.num_key_value_heads,
            config.head_dim,
        )
        # NaN wherever nothing was written: reading a wrong slot cannot go unnoticed.
        self.kv_cache = KVCache(torch.full(shape, float("nan")), torch.full(shape, float("nan")))
        self.loaded = loaded

    def batch(self, members: list[int], spans: list[tuple[int, int]], first_key: int = 0) -> Any:
        return make_extend_batch(spans, [self.pages[i] for i in members], PAGE_SIZE, CPU, first_key=first_key)

    def extend(self, members: list[int], starts: list[int], chunks: list[list[int]]) -> torch.Tensor:
        batch = self.batch(members, [(s, len(c)) for s, c in zip(starts, chunks, strict=True)])
        ids = torch.tensor([token for chunk in chunks for token in chunk])
        # Unwritten slots of the last page are behind the mask, but NaN times zero is NaN: make them plain zeros.
        for i, start, chunk in zip(members, starts, chunks, strict=True):
            used = self.pages[i][: -(-(start + len(chunk)) // PAGE_SIZE)]
            for tensor in (self.kv_cache.k, self.kv_cache.v):
                tensor[:, used] = tensor[:, used].nan_to_num()
        return self.loaded.target.forward(ids, batch, self.kv_cache)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < RELATIVE, f"relative error {error:.1e}"


SWEEP: dict[str, dict[str, Any]] = {
    "plain": {},
    "no qk-norm, as Air": {"use_qk_norm": False},
    "no attention bias": {"attention_bias": False},
    "groups of experts": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "several dense layers": {"first_k_dense_replace": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "only dense layers": {"first_k_dense_replace": 3},
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads as heads": {"num_key_value_heads": 4},
    "twelve heads per KV head": {"num_attention_heads": 12, "num_key_value_heads": 1},
    "quarter rotary": {"partial_rotary_factor": 0.25},
    "whole rotary": {"partial_rotary_factor": 1.0},
    "top 1": {"num_experts_per_tok": 1},
    "top 8 of 8": {"num_experts_per_tok": 8},
    "weights not renormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "two shared experts": {"n_shared_experts": 2},
    "tied embeddings": {"tie_word_embeddings": True},
    "other theta and eps": {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
}


@torch.inference_mode()
@pytest.mark.parametrize("name", SWEEP)
def test_logits_agree_whatever_the_config_and_the_chunks(name: str, tmp_path: Path) -> None:
    config = tiny_config(**SWEEP[name])
    # The same in every run, and one of those where no two experts are so close that rounding chooses between them.
    state = random_state(config, seed=(crc32(name.encode()) + 1) % 1000)
    loaded = load(write_checkpoint(tmp_path / "ours", config, state=state, dtype=torch.float32))
    oracle = transformers_model(tmp_path / "theirs", config, state)
    rng = random.Random(name)
    lengths = [1, 2, rng.randint(3, 40), rng.randint(41, 300)]
    prompts = [[rng.randrange(config["vocab_size"]) for _ in range(n)] for n in lengths]
    expected = [oracle(torch.tensor([prompt])).logits[0] for prompt in prompts]
    runner = Runner(loaded, len(prompts), seed=1)
    done = [0] * len(prompts)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(done[i] < lengths[i] for i in range(len(prompts))):
        members = [i for i in range(len(prompts)) if done[i] < lengths[i]]
        sizes = [min(lengths[i] - done[i], rng.choice([1, 1, 2, 4, 7, 8, 33, 64, 300])) for i in members]
        chunks = [prompts[i][done[i] : done[i] + n] for i, n in zip(members, sizes, strict=True)]
        hidden = runner.extend(members, [done[i] for i in members], chunks)
        for i, n, rows in zip(members, sizes, hidden.split(sizes), strict=True):
            found[i].append(loaded.target.compute_logits(rows))
            done[i] += n
    for rows_of, logits in zip(found, expected, strict=True):
        assert_close(torch.cat(rows_of), logits)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [*range(1, 18), 31, 32, 33, 64, 299, 300])
def test_every_chunk_size_gives_the_logits_of_the_whole(chunk: int, tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2)
    loaded = load(write_checkpoint(tmp_path, config, dtype=torch.float32))
    prompt = [random.Random(i).randrange(64) for i in range(300)]
    whole = loaded.target.compute_logits(Runner(loaded, 1, seed=2).extend([0], [0], [prompt]))
    runner = Runner(loaded, 1, seed=3)
    parts = [runner.extend([0], [s], [prompt[s : s + chunk]]) for s in range(0, 300, chunk)]
    assert_close(loaded.target.compute_logits(torch.cat(parts)), whole)


@torch.inference_mode()
@pytest.mark.parametrize("quant", ["channel", "tensor", "tensor_static", "block", "ct_block"])
def test_fp8_checkpoints_agree_with_independently_dequantized_weights(quant: Quant, tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config, seed=4)
    folder = write_checkpoint(tmp_path / "ours", config, quant=quant, state=state)
    twin = dequantized(quantized(state, quant, torch.bfloat16, lambda name: False))
    oracle = transformers_model(tmp_path / "theirs", config, twin)
    prompt = [random.Random(i).randrange(64) for i in range(50)]
    loaded = load(folder)
    runner = Runner(loaded, 1, seed=0)
    found = loaded.target.compute_logits(runner.extend([0], [0], [prompt]))
    assert_close(found, oracle(torch.tensor([prompt])).logits[0])
    unquantized = transformers_model(tmp_path / "full", config, state)(torch.tensor([prompt])).logits[0]
    assert (found - unquantized).abs().max() > 10 * RELATIVE * unquantized.abs().max(), "quantization changed nothing"


def drafted_logits(runner: Runner, prompt: list[int], next_tokens: list[int]) -> torch.Tensor:
    """Prompt through target and draft, then one chained draft step per further token. Returns logits [·, V]."""
    draft = runner.loaded.draft
    assert draft is not None
    n = len(prompt)
    hidden = runner.extend([0], [0], [prompt])
    known = [*prompt, next_tokens[0]]
    batch = runner.batch([0], [(1, n)], first_key=1)
    out = draft.forward(torch.tensor(known[1:]), hidden, batch, runner.kv_cache)
    logits = [draft.compute_logits(out)]
    last = out[-1:]
    for step, token in enumerate(next_tokens[1:]):
        batch = runner.batch([0], [(n + 1 + step, 1)], first_key=1)
        last = draft.forward(torch.tensor([token]), last, batch, runner.kv_cache)
        logits.append(draft.compute_logits(last))
    return torch.cat(logits)


def through_fp8(weight: torch.Tensor) -> torch.Tensor:
    """Every row in e4m3 by its largest value, and back."""
    step = weight.abs().amax(1, keepdim=True) / 448
    return (weight / step).to(torch.float8_e4m3fn).float() * step


def expected_drafts(
    reference: NextNReference, prompt: list[int], next_tokens: list[int], *, mutation: str = ""
) -> torch.Tensor:
    """The same from transformers' parts, recomputed over the whole sequence at each step; positions as in the paper."""
    ids = torch.tensor([*prompt[1:], *next_tokens])
    hidden = reference.target.model(torch.tensor([prompt])).last_hidden_state[0]
    if mutation == "swapped concat":
        half = reference.eh_proj.shape[1] // 2
        reference.eh_proj = torch.cat([reference.eh_proj[:, half:], reference.eh_proj[:, :half]], 1)
    logits = []
    for step in range(len(next_tokens)):
        n = len(prompt) + step
        out = reference(ids[:n], hidden, torch.arange(n))
        logits.append(out @ reference.head.t() if step == 0 else out[-1:] @ reference.head.t())
        carried = out[-1:]
        if mutation == "carried state normed twice":
            carried = reference.norms["shared_head_norm"](carried)
        hidden = torch.cat([hidden, carried])
    return torch.cat(logits)


@torch.inference_mode()
@pytest.mark.parametrize("head", ["stored", "fp8"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("quant", ["none", "channel", "block"])
def test_the_draft_agrees_with_its_definition_three_steps_deep(
    quant: Quant, own: bool, head: str, tmp_path: Path
) -> None:
    config = tiny_config()
    state = random_state(config, seed=5, own_head=own, own_embedding=own)
    folder = write_checkpoint(tmp_path / "ours", config, quant=quant, state=state)
    twin = dequantized(quantized(state, quant, torch.bfloat16, lambda name: False))
    prompt = [random.Random(i).randrange(64) for i in range(21)]
    found = drafted_logits(Runner(load(folder, draft_head=head), 1, seed=0), prompt, [7, 8, 9])
    oracle = transformers_model(tmp_path / "theirs", config, twin)
    if head == "fp8":
        name = "model.layers.3.shared_head.head.weight"
        twin[name] = through_fp8(twin[name if own else "lm_head.weight"])
    assert_close(found, expected_drafts(NextNReference(oracle, twin), prompt, [7, 8, 9]))
    for mutation in ("swapped concat", "carried state normed twice"):
        wrong = expected_drafts(NextNReference(oracle, twin), prompt, [7, 8, 9], mutation=mutation)
        assert (found[-1] - wrong[-1]).abs().max() > 10 * RELATIVE * wrong.abs().max(), f"{mutation} goes unnoticed"
