"""Triton's adjustment of logits, distributions and draws, against torch, plain Python and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nextn.kernels import truncation
from nextn.kernels.argmax import argmax
from nextn.kernels.penalties import NOTHING, LogitRules, adjust_logits_by_slot, count_tokens
from nextn.kernels.random_uniform import ACCEPT_STREAM, DRAFT_STREAM, FINAL_STREAM, random_uniform
from nextn.kernels.sample_tokens import sample_tokens
from nextn.kernels.sampling_probs import sampling_probs
from nextn.protocol.messages import AddRequest
from nextn.protocol.sampling import TokenSampling
from nextn.scheduler.sequence import Sequence
from nextn.speculative.logits import LogitAdjuster, Row
from scipy import stats

from tests.kernels.references import in_torch
from tests.kernels.test_sampling import expected_probs

INF = math.inf
SIZES = [24, 1000, 4099]
LEAST = 1e-36
"""Probabilities about as small as float32's smallest may be zero in one way and not in another: exponentials differ."""


def splitmix(seed: int, position: int, stream: int) -> float:
    """The definition, in Python's integers."""

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    state = mixed((seed + (stream + 1) * gamma) % 2**64)
    return (mixed((state + (position + 1) * gamma) % 2**64) >> 11) * 2.0**-53


@pytest.mark.parametrize("stream", [DRAFT_STREAM, ACCEPT_STREAM, FINAL_STREAM])
def test_random_numbers_are_exactly_those_of_the_definition(stream: int, device: torch.device) -> None:
    seeds = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, *range(100, 150)]
    positions = [0, 1, 7, 151_551, 2**31, 2**40, *range(50)]
    keys = torch.tensor(seeds), torch.tensor(positions)
    expected = [splitmix(seed, position, stream) for seed, position in zip(seeds, positions, strict=True)]
    assert random_uniform(*(key.to(device) for key in keys), stream).tolist() == expected
    assert in_torch(random_uniform, *keys, stream).tolist() == expected
    table = random_uniform(keys[0].to(device), (keys[1][:, None] + torch.arange(3)).to(device), stream)
    assert table[:, 0].tolist() == expected
    assert table[:, 2].tolist() == [splitmix(s, p + 2, stream) for s, p in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [*SIZES, 9001])
def test_argmax_is_the_first_largest(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = (torch.randn(6, vocab) * 4).round().to(dtype)  # many equal
    logits[1, :] = -INF
    logits[2, 3 :: vocab // 5] = 1e30
    logits[3] = -1e30
    logits[3, vocab - 1] = -1e29
    logits[4] = -1
    logits[4, 7], logits[4, 9] = -0.0, 0.0
    logits[5, vocab // 2] = math.nan
    found = argmax(logits.to(device)).tolist()
    assert found[:5] == [row.index(max(row)) for row in logits[:5].tolist()]
    assert found[5] == vocab // 2, "a NaN is the largest, as in torch"


def distributions(logits: torch.Tensor, rules: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    return sampling_probs(logits.to(device), **{name: rule.to(device) for name, rule in rules.items()}).cpu()


@pytest.mark.parametrize("vocab", SIZES)
def test_distributions_of_a_mixed_batch_equal_torchs(vocab: int, device: torch.device) -> None:
    logits = torch.randn(8, vocab) * 3
    rules = {
        "temperature": torch.tensor([0.0, 0.3, 1.0, 2.0, 1.0, 0.7, 1.0, 0.1]),
        "top_k": torch.tensor([0, 5, 0, 10, vocab, 7, 0, 40]),
        "top_p": torch.tensor([1.0, 0.9, 0.31, 0.97, 1.0, 1.0, 1.0, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.05, 0.0, 0.2, 0.5, 0.0, 0.0]),
    }
    some = [("top_k", "top_p", "min_p"), ("top_p",)]
    every = [*some, (), ("top_k",), ("min_p",), ("top_k", "top_p"), ("top_k", "min_p"), ("top_p", "min_p")]
    for names in every if vocab == SIZES[0] else some:
        given = {name: rules[name] for name in ("temperature", *names)}
        found = distributions(logits, given, device)
        expected = in_torch(sampling_probs, logits, **given)
        assert torch.equal(found > LEAST, expected > LEAST)
        # float32 sums in another order, and logits / temperature rounded before or after the largest is taken off.
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("vocab", [37, 4099])
def test_distributions_follow_their_definitions_in_float64(vocab: int, device: torch.device) -> None:
    rng = np.random.default_rng(vocab)
    num_rows = 8
    logits = torch.tensor(rng.normal(size=(num_rows, vocab)) * 3, dtype=torch.float32)
    rules = {
        "temperature": torch.tensor(rng.choice([0.0, 0.3, 1.0, 2.0], num_rows), dtype=torch.float32),
        "top_k": torch.tensor(rng.choice([0, 1, 5, 37, 5000], num_rows)),
        "top_p": torch.tensor(rng.choice([1.0, 0.9, 0.31, 0.001], num_rows), dtype=torch.float32),
        "min_p": torch.tensor(rng.choice([0.0, 0.05, 0.5], num_rows), dtype=torch.float32),
    }
    found = distributions(logits, rules, device)
    for row in range(num_rows):
        t, k, p, m = (rule[row].item() for rule in rules.values())
        expected = expected_probs(logits[row].double().numpy(), t, int(k), p, m)
        np.testing.assert_allclose(found[row].numpy(), expected, atol=2e-6)  # sums of float32


def test_of_equally_likely_tokens_the_first_are_kept(device: torch.device) -> None:
    vocab = 4099
    logits = torch.full((4, vocab), -20.0)
    equal = torch.tensor([2, 40, 4000, 4095, 4096, 4098])  # in two parts of a row
    logits[:, equal] = 1.0
    logits[:, 77] = 2.0
    rules = {"temperature": torch.ones(4), "top_k": torch.tensor([4, 1, 0, 6]), "top_p": torch.tensor([1, 1, 0.5, 0.7])}
    found = distributions(logits, rules, device)
    # e / (e + 6) = 0.31, each of the others 0.115: two of them reach 0.5. Of six, 0.35 and 0.13: three reach 0.7.
    kept = [[2, 40, 77, 4000], [77], [2, 40, 77], [2, 40, 77, 4000]]
    assert [row.nonzero()[:, 0].tolist() for row in found] == kept
    torch.testing.assert_close(found.sum(-1), torch.ones(4))


def test_equal_logits_everywhere(device: torch.device) -> None:
    vocab = 4099
    rules = {
        "temperature": torch.tensor([1.0, 0.5, 1.0, 0.0]),
        "top_k": torch.tensor([0, 3000, 4098, 5]),
        "top_p": torch.tensor([0.25, 1.0, 1.0, 0.5]),
    }
    found = distributions(torch.zeros(4, vocab), rules, device)
    expected = [1025, 3000, 4098, 1]  # ⌈0.25 · 4099⌉
    assert [int((row > 0).sum()) for row in found] == expected
    for row, num in zip(found, expected, strict=True):
        torch.testing.assert_close(row[:num], torch.full((num,), 1 / num))


def test_rows_with_more_candidates_than_memory_are_truncated_in_place(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "CANDIDATES", 64)
    logits = torch.randn(5, 1000)
    rules = {
        "temperature": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
        "top_k": torch.tensor([0, 500, 300, 500, 3]),
        "top_p": torch.tensor([0.9, 1.0, 0.8, 0.9, 1.0]),
        "min_p": torch.tensor([0.0, 0.01, 0.0, 0.0, 0.0]),
    }
    found, expected = distributions(logits, rules, device), in_torch(sampling_probs, logits, **rules)
    assert torch.equal(found > LEAST, expected > LEAST)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-12)


def test_extreme_logits_and_temperatures(device: torch.device) -> None:
    vocab = 4099
    logits = torch.full((6, vocab), -INF)
    logits[0, 4097] = -5.0  # all else forbidden
    logits[1, 8:11] = 1e30
    logits[2] = -1e30
    logits[2, 5] = -1e30 + 1e28
    logits[3, :50] = torch.linspace(-3, 3, 50)
    logits[4, [3, 4098]] = 7.0
    logits[5] = torch.linspace(300, -300, vocab)  # most underflow
    rules = {
        "temperature": torch.tensor([1.0, 1.0, 1.0, 1e-40, 1.0, 1.0]),
        "top_k": torch.tensor([10, 2, 10, 10, 0, 4000]),
        "top_p": torch.tensor([0.9, 1.0, 1.0, 1.0, 0.4, 1.0]),
    }
    found = distributions(logits, rules, device)
    assert bool(found.isfinite().all())
    kept = [row.nonzero()[:, 0].tolist() for row in found]
    assert kept[:5] == [[4097], [8, 9], [5], [49], [3]]
    expected = torch.softmax(logits[5].double(), 0).float()
    torch.testing.assert_close(found[5], expected, rtol=1e-4, atol=1e-30)


def test_tiny_probabilities_are_kept_where_the_rules_keep_them(device: torch.device) -> None:
    logits = torch.full((3, 4099), -INF)
    logits[:, 9], logits[:, 4098], logits[:, 7] = 20.0, 2.0, -18.0  # 1, 1.5e-8 and 3e-17 of the mass
    rules = {"temperature": torch.ones(3), "top_k": torch.tensor([0, 2, 3]), "min_p": torch.tensor([1e-9, 0.0, 0.0])}
    found = distributions(logits, rules, device)
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[9, 4098], [9, 4098], [7, 9, 4098]]
    torch.testing.assert_close(found[2, [4098, 7]], torch.tensor([-18.0, -38.0]).exp(), rtol=1e-5, atol=0)


def test_a_given_output_is_filled_and_bfloat16_is_widened(device: torch.device) -> None:
    logits, temperature = torch.randn(3, 100).bfloat16().to(device), torch.ones(3, device=device)
    out = torch.full((3, 100), math.nan, device=device)
    assert sampling_probs(logits, temperature, out=out) is out
    torch.testing.assert_close(out, torch.softmax(logits.float(), -1))
    on_cpu = torch.empty(3, 100)
    assert in_torch(sampling_probs, logits.float().cpu(), temperature.cpu(), out=on_cpu) is on_cpu
    torch.testing.assert_close(on_cpu, out.cpu())


def test_a_rows_distribution_does_not_depend_on_its_batch(device: torch.device) -> None:
    logits = torch.randn(3, 4099) * 3
    rules = {"temperature": torch.tensor([1.0, 0.5, 0.0]), "top_p": torch.tensor([0.9, 1.0, 1.0])}
    together = distributions(logits, rules, device)
    for row in range(3):
        alone = distributions(logits[row : row + 1], {k: v[row : row + 1] for k, v in rules.items()}, device)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("own", [{}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_a_neighbours_rules_change_no_bit_of_a_row(own: dict[str, float], triton: bool, device: torch.device) -> None:
    num_rows, vocab = 20, 1000
    logits = torch.randn(num_rows, vocab) * 3
    off: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    neighbour: dict[str, float] = {"top_k": 40, "top_p": 0.5, "min_p": 0.1}
    alone = {name: torch.full((num_rows,), value) for name, value in {"temperature": 0.8, **own}.items()}
    beside = {name: torch.tensor([own.get(name, value)] * num_rows + [neighbour[name]]) for name, value in off.items()}
    beside["temperature"] = torch.full((num_rows + 1,), 0.8)

    def probs(logits: torch.Tensor, rules: dict[str, torch.Tensor]) -> torch.Tensor:
        return distributions(logits, rules, device) if triton else in_torch(sampling_probs, logits, **rules)

    assert torch.equal(probs(logits, alone), probs(torch.cat([logits, logits[:1]]), beside)[:num_rows])


@pytest.mark.parametrize("vocab", [*SIZES, 9001])
def test_draws_equal_torchs(vocab: int, device: torch.device) -> None:
    probs = torch.softmax(torch.randn(40, vocab) * 4, -1)
    probs[torch.rand(40, vocab) < 0.5] = 0
    probs[3] = 0
    probs[3, vocab - 1] = 1e-30
    probs[4] *= 1e-8
    uniform = torch.rand(40, dtype=torch.float64)
    uniform[0], uniform[1], uniform[2] = 0.0, 1.0 - 2.0**-53, 2.0**-53
    found = sample_tokens(probs.to(device), uniform.to(device)).cpu()
    assert torch.equal(found, in_torch(sample_tokens, probs, uniform))
    assert bool((probs.gather(1, found[:, None]) > 0).all())


def test_draws_follow_the_distribution(device: torch.device) -> None:
    probs = torch.softmax(torch.randn(24), 0)
    probs[[0, 5, 23]] = 0
    num = 20_000
    seeds, positions = torch.arange(num), torch.full((num,), 9)
    drawn = in_torch(sample_tokens, probs.expand(num, 24), in_torch(random_uniform, seeds, positions, DRAFT_STREAM))
    uniform = random_uniform(seeds[:100].to(device), positions[:100].to(device), DRAFT_STREAM)
    assert torch.equal(sample_tokens(probs.expand(100, 24).to(device), uniform).cpu(), drawn[:100])
    counts = torch.bincount(drawn, minlength=24).numpy()
    expected = (probs.double() / probs.double().sum() * num).numpy()
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4


def test_no_rows_and_impossible_rows_give_tokens_that_exist(device: torch.device) -> None:
    empty = torch.empty(0, 24, device=device)
    assert argmax(empty).shape == (0,)
    assert sampling_probs(empty, torch.empty(0, device=device)).shape == (0, 24)
    assert sample_tokens(empty, torch.empty(0, dtype=torch.float64, device=device)).shape == (0,)
    uniform = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    impossible = torch.stack([torch.zeros(24), torch.full((24,), math.nan)]).to(device)
    assert all(0 <= token < 24 for token in sample_tokens(impossible, uniform).tolist())


REQUESTS = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": -0.3},
    {"repetition_penalty": 0.8, "presence_penalty": 0.1, "frequency_penalty": 0.37},
    {"logit_bias": {0: 5.5, 3: -100.0, 23: 0.25}},
    {"min_new_tokens": 5},
    {"repetition_penalty": 1.1, "logit_bias": {7: 1.5, 9: -2.0}, "min_new_tokens": 100, "frequency_penalty": 0.5},
]


def sequences(vocab: int) -> list[Sequence]:
    """One per request, and slots in another order."""
    rng = np.random.default_rng(vocab)
    found = []
    for i, fields in enumerate(REQUESTS):
        values = {"max_new_tokens": 99, "seed": i, **fields}
        prompt = rng.integers(0, vocab, 6).tolist()
        seq = Sequence(
            AddRequest(rid=str(i), input_ids=prompt, sampling=TokenSampling(**values)),
            i,
            0.0,
            99,
            frozenset([vocab - 1, 9, 3]),
        )
        seq.append([t for t in rng.integers(0, vocab, 4).tolist() if t not in seq.stop_ids] + [prompt[0]])
        seq.slot = (i * 3 + 1) % len(REQUESTS)
        found.append(seq)
    return found


def rules_of(seqs: list[Sequence], vocab: int, device: torch.device) -> LogitRules:
    rules = LogitRules.for_slots(len(seqs), vocab, max_bias=5, max_stop_ids=3, device=device)
    for seq in seqs:
        s = seq.request.sampling
        rules.assign(
            seq.slot,
            seq.tokens[: seq.num_prompt],
            seq.tokens[seq.num_prompt :],
            repetition=s.repetition_penalty,
            presence=s.presence_penalty,
            frequency=s.frequency_penalty,
            logit_bias=s.logit_bias,
            stop_ids=seq.stop_ids,
            min_new_tokens=s.min_new_tokens,
        )
    return rules


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize(("vocab", "num_before", "num_drafts"), [(24, 0, 3), (1000, 2, 0), (8195, 0, 1), (24, 1, 2)])
def test_rules_hold_at_every_draft_position_as_on_the_host(
    vocab: int, num_before: int, num_drafts: int, triton: bool, device: torch.device
) -> None:
    seqs = sequences(vocab)
    total = num_before + num_drafts
    drafts = torch.randint(0, vocab, (len(seqs), 5))
    drafts[1, 0] = seqs[1].tokens[0]
    drafts[2, :2] = seqs[2].tokens[-1]
    logits = torch.randn(len(seqs) * (num_drafts + 1), vocab) * 3
    host_rows = [
        Row(s, d[:j]) for s, d in zip(seqs, drafts.tolist(), strict=True) for j in range(num_before, total + 1)
    ]
    expected = LogitAdjuster().adjust(logits, host_rows)

    where = device if triton else torch.device("cpu")
    run = adjust_logits_by_slot if triton else (lambda *a, **o: in_torch(adjust_logits_by_slot, *a, **o))
    state = (
        rules_of(seqs, vocab, where),
        torch.tensor([seq.slot for seq in seqs], device=where),
        torch.tensor([len(seq.tokens) for seq in seqs], device=where),
        drafts.to(where),
    )
    found = run(logits.to(where), *state, num_before=num_before)
    # Bit for bit on the CPU; a GPU may fuse a product and a difference.
    torch.testing.assert_close(found.cpu(), expected, rtol=0 if where.type == "cpu" else 1e-6, atol=0)
    changed = logits.to(where, copy=True)
    assert run(changed, *state, num_before=num_before, out=changed) is changed
    assert torch.equal(changed, found)
    wide = run(logits.bfloat16().to(where), *state, num_before=num_before)
    expected = LogitAdjuster().adjust(logits.bfloat16().float(), host_rows)
    torch.testing.assert_close(wide.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab", [24, 1000, 8195])
def test_a_mask_forbids_tokens_after_no_draft_and_nothing_else(vocab: int, device: torch.device) -> None:
    seqs = sequences(vocab)
    slots = torch.tensor([seq.slot for seq in seqs])
    held, freed = slots[[0, 2, 3, 4]], slots[3]
    is_allowed = torch.rand(len(held), vocab) < 0.5
    padded = torch.nn.functional.pad(is_allowed, (0, -vocab % 32)).view(len(held), -1, 32)
    words = (padded.long() << torch.arange(32)).sum(-1).to(torch.int32)
    slots[4] = NOTHING
    arguments = (
        slots.to(device),
        torch.tensor([len(seq.tokens) for seq in seqs], device=device),
        torch.zeros(len(seqs), 1, dtype=torch.int64, device=device),
    )
    logits = torch.randn(len(seqs) * 2, vocab)
    rules = rules_of(seqs, vocab, device)
    plain = adjust_logits_by_slot(logits.to(device), rules, *arguments).cpu()
    on_cpu, rules_on_cpu = [x.cpu() for x in arguments], rules_of(seqs, vocab, torch.device("cpu"))
    for one in (rules, rules_on_cpu):
        where = one.allowed.device
        one.mask(held.to(where), words.to(where))
        one.unmask(freed.to(where)[None])
    masked = adjust_logits_by_slot(logits.to(device), rules, *arguments).cpu()
    in_place = logits.to(device, copy=True)
    adjust_logits_by_slot(in_place, rules, *arguments, out=in_place)
    assert torch.equal(in_place.cpu(), masked)
    expected = plain.clone()
    for row, bits in (
        (0, is_allowed[0]),
        (4, is_allowed[1]),
    ):  # the first row of either sequence; padding is left alone
        expected[row] = plain[row].masked_fill(~bits, -INF)
    assert torch.equal(masked, expected)
    torch.testing.assert_close(
        masked, in_torch(adjust_logits_by_slot, logits, rules_on_cpu, *on_cpu), rtol=1e-6, atol=0
    )
    behind = adjust_logits_by_slot(logits[::2].to(device), rules, *arguments, num_before=1).cpu()
    assert torch.equal(behind.isinf(), plain[1::2].isinf())


@pytest.mark.parametrize("triton", [True, False])
def test_decided_tokens_are_counted_and_gaps_are_not(triton: bool, device: torch.device) -> None:
    where = device if triton else torch.device("cpu")
    counts = torch.zeros(4, 30, dtype=torch.int32, device=where)
    slots = torch.tensor([2, NOTHING, 0], dtype=torch.int32, device=where)
    tokens = torch.tensor([[5, 5, 29, NOTHING], [1, 2, 3, 4], [0, NOTHING, NOTHING, NOTHING]], device=where)
    run = count_tokens if triton else (lambda *a: in_torch(count_tokens, *a))
    run(counts, slots, tokens)
    run(counts, slots, tokens)
    expected = torch.zeros(4, 30, dtype=torch.int32)
    expected[2, 5], expected[2, 29], expected[0, 0] = 4, 2, 2
    assert torch.equal(counts.cpu(), expected)


def test_a_slots_next_request_inherits_nothing() -> None:
    vocab = 24
    rules = LogitRules.for_slots(2, vocab, max_bias=2, max_stop_ids=2, device=torch.device("cpu"))
    rules.assign(1, [1, 2], [3], repetition=2.0, presence=1.0, logit_bias={4: 1.0}, stop_ids=[5], min_new_tokens=9)
    rules.assign(1, [7], [], frequency=1.0)
    logits = torch.ones(1, vocab)
    state = (torch.tensor([1]), torch.tensor([1]), torch.empty(1, 0, dtype=torch.int64))
    assert torch.equal(adjust_logits_by_slot(logits, rules, *state), logits)
    rules.assign(1, [7], [])
    count_tokens(rules.output_counts, torch.tensor([1]), torch.tensor([[3, 3]]))
    assert torch.equal(adjust_logits_by_slot(logits, rules, *state), logits)


def test_what_does_not_fit_is_refused() -> None:
    rules = LogitRules.for_slots(2, 24, max_bias=1, max_stop_ids=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="slot 0: 2 biases; there is memory for 1"):
        rules.assign(0, [1], [], logit_bias={1: 1.0, 2: 1.0})
    with pytest.raises(ValueError, match="slot 0: 2 stop ids; there is memory for 1"):
        rules.assign(0, [1], [], stop_ids=[1, 2])
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 rows cannot be shared evenly by 2 sequences"):
        adjust_logits_by_slot(torch.zeros(3, 24), rules, ids, ids, ids[:, None])
    with pytest.raises(ValueError, match="the last row follows 2 drafts, found 1"):
        adjust_logits_by_slot(torch.zeros(6, 24), rules, ids, ids, ids[:, None])
