"""Training resumes exactly, and its fast paths compute what the plain ones do."""

import pytest
import torch
from nextn.demo import checkpoint_dir
from nextn.demo.checkpoint_files import load_models
from nextn.demo.corpus.stream import document
from nextn.demo.draft_steps import draft_steps
from nextn.demo.modeling import sorted_experts_forward
from nextn.demo.optim import orthogonalize
from nextn.demo.packing import LONG_ROW_EVERY, LONG_ROW_LEN, ROW_LEN, make_batch
from nextn.demo.train_nextn import train_nextn
from nextn.demo.train_target import new_target, train_target
from nextn.demo.training import Budget, schedule
from tokenizers import Tokenizer

TOKENS = 512


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small matrices gain nothing from threads, and lose much where something else is running."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))


def _same(one, other):
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def _train(tokenizer, work_dir, resume, stop):
    work_dir.mkdir(exist_ok=True)
    budget = Budget(steps=2)
    return train_target(tokenizer, work_dir, budget, 7, resume, tokens_per_step=TOKENS, stop_after_steps=stop)


def test_a_resumed_target_run_ends_in_the_weights_of_an_uninterrupted_one(tokenizer, tmp_path):
    whole = _train(tokenizer, tmp_path / "whole", resume=False, stop=None)
    half = _train(tokenizer, tmp_path / "parts", resume=False, stop=1)
    resumed = _train(tokenizer, tmp_path / "parts", resume=True, stop=None)
    assert not _same(whole, half)
    assert _same(whole, resumed)


def test_a_resumed_nextn_run_ends_in_the_weights_of_an_uninterrupted_one(tokenizer, tmp_path):
    ended = []
    for name, stops in (("whole", [None]), ("parts", [1, None])):
        (tmp_path / name).mkdir()
        for resume, stop in enumerate(stops):
            target = new_target(tokenizer, 7)
            last = train_nextn(
                tokenizer, target, tmp_path / name, Budget(steps=2), 7, bool(resume),
                tokens_per_step=TOKENS, stop_after_steps=stop,
            )  # fmt: skip
        ended.append(last)
    assert _same(*ended)


def test_batches_depend_on_the_step_alone_and_start_with_a_document(tokenizer):
    first, again = make_batch(tokenizer, 0, 3, TOKENS), make_batch(tokenizer, 0, 3, TOKENS)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.weights, again.weights)
    assert first.tokens.shape == first.weights.shape == (1, ROW_LEN)
    start = tokenizer.encode("".join(span.text for span in document(0, 3 << 16))).ids
    assert first.tokens[0, : len(start)].tolist() == start
    assert torch.all(first.weights[:, 0] == 0)
    assert make_batch(tokenizer, 0, LONG_ROW_EVERY - 1, LONG_ROW_LEN).tokens.shape == (1, LONG_ROW_LEN)


def test_sorted_experts_equal_a_loop_over_tokens():
    torch.manual_seed(0)

    class Experts:
        num_experts = 4
        gate_up_proj = torch.randn(4, 12, 8, requires_grad=True)
        down_proj = torch.randn(4, 8, 6, requires_grad=True)

    experts = Experts()
    x = torch.randn(10, 8, requires_grad=True)
    index, weight = torch.stack([torch.randperm(4)[:2] for _ in range(10)]), torch.rand(10, 2)
    rows = []
    for token in range(10):
        row = torch.zeros(8)
        for expert, share in zip(index[token], weight[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            row = row + share * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    parameters = (x, experts.gate_up_proj, experts.down_proj)
    plain, fast = torch.stack(rows), sorted_experts_forward(experts, x, index, weight)
    torch.testing.assert_close(fast, plain)
    plain_grads = torch.autograd.grad(plain.square().sum(), parameters)
    fast_grads = torch.autograd.grad(fast.square().sum(), parameters)
    # sums of large float32 values in another order
    torch.testing.assert_close(fast_grads, plain_grads, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_parallel_draft_steps_equal_a_server_that_drafts_one_token_at_a_time(tokenizer):
    """For one position, the chain recomputed with a growing key-value cache through transformers' own layer."""
    from transformers import DynamicCache

    target, nextn = load_models(checkpoint_dir())
    ids = torch.tensor([tokenizer.encode("[gMASK]<sop><|user|>\nWhat is 12 + 7?<|assistant|>\n<think>").ids])
    hidden = target.model(ids, use_cache=False).last_hidden_state
    embedded = target.model.embed_tokens(ids)
    parallel = list(draft_steps(nextn, target.model.rotary_emb, embedded, hidden, 3))

    root = 8
    cache = DynamicCache()
    nextn.layer.self_attn.layer_idx = 0
    state = hidden[:, : root + 1]
    inputs, positions = embedded[:, 1 : root + 2], torch.arange(root + 1)
    for step in range(3):
        x = nextn.combine(inputs, state)
        rotary = target.model.rotary_emb(x, positions.unsqueeze(0))
        state = nextn.norm(nextn.layer(x, position_embeddings=rotary, past_key_values=cache))[:, -1:]
        # float32 on both sides; the order of summation differs
        torch.testing.assert_close(parallel[step][:, root : root + 1], state, rtol=1e-3, atol=1e-3)
        inputs, positions = embedded[:, root + step + 2 : root + step + 3], torch.tensor([root + step + 1])


def test_orthogonalized_updates_have_singular_values_near_one():
    update = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(update).float())
    # five iterations of the quintic leave singular values between about 0.7 and 1.2
    assert 0.5 < values.min() < values.max() < 1.3


def test_the_schedule_warms_up_and_always_ends_annealed():
    assert schedule(0.0, 0) < 0.1
    assert schedule(0.3, 1000) == 1.0
    assert schedule(0.999, 1000) <= 0.02


@pytest.mark.parametrize("bad", [{}, {"steps": 1, "minutes": 1.0}])
def test_a_budget_is_steps_or_minutes(bad):
    with pytest.raises(ValueError, match="either steps or minutes"):
        Budget(**bad)
