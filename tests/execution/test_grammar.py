"""Outputs that follow a grammar: exactly, at every draft position, whatever else is computed beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from nextn.config.engine_config import EngineConfig
from nextn.demo import checkpoint_dir
from nextn.execution.decode_runner import DecodeRunner
from nextn.execution.engine import Engine
from nextn.layers.batch import make_extend_batch
from nextn.protocol.messages import AddRequest
from nextn.speculative.decode_state import SlotMirror
from nextn.speculative.policy import DraftLengthPolicy
from nextn.text.grammar import json_form, regex_form
from nextn.text.tokenizer import Tokenizer
from scipy import stats

from tests.checkpoints import tiny_config, write_checkpoint
from tests.conftest import request, run_all, run_outputs

EOS = [2528, 2535]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y", "xy"]}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
PATTERN = "([ab]{2}|[cd]{3})-[0-9]{4,6}!"
PROSE = "[a-zA-Z ,.\n]{20,200}"
GRAMMARS = [regex_form(PATTERN, "regex", str).as_grammar(), json_form(SCHEMA, "json_schema", str).as_grammar()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the embedded one's vocabulary, and the tokenizer."""
    config = tiny_config(vocab_size=2560, eos_token_id=EOS)
    made = write_checkpoint(tmp_path_factory.mktemp("grammar"), config, quant="channel")
    shutil.copy(checkpoint_dir() / "tokenizer.json", made)
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(checkpoint_dir())


def _engine(folder: Path, **options: Any) -> Engine:
    return Engine(
        EngineConfig(**{"model_path": str(folder), "device": "cpu", "num_draft_steps": 3, "canary": "off", **options})
    )


def _prompt(i: int) -> list[int]:
    return [(37 * i + 11 * j) % 2500 for j in range(5 + 3 * i)]


def _requests(num: int = 6, **fields: Any) -> list[AddRequest]:
    """With grammars, but for every third."""
    return [
        request(str(i), _prompt(i), 60, grammar=None if i % 3 == 2 else GRAMMARS[i % 3], ignore_eos=False, **fields)
        for i in range(num)
    ]


def _check_form(outputs: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    for i, ids in enumerate(outputs.values()):
        text = tokenizer.decode(ids)
        if i % 3 == 0:
            assert re.fullmatch(PATTERN, text), text
        elif i % 3 == 1:
            found = json.loads(text)
            assert found["a"] in ("x", "y", "xy")
            assert 0 <= found["b"] <= 99
        if i % 3 != 2:
            assert ids[-1] in EOS


@pytest.fixture(scope="module")
def plain(folder: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Greedy outputs one at a time, without drafts: what all else must equal."""
    engine = _engine(folder, num_draft_steps=0, enable_prefix_cache=False)
    outputs: dict[str, list[int]] = {}
    for one in _requests():
        outputs |= run_all(engine, [one])
    _check_form(outputs, tokenizer)
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"num_draft_steps": 1},
        {"num_draft_steps": 3},
        {"num_draft_steps": 5, "chunked_prefill_size": 7},
        {"page_size": 4, "max_total_tokens": 100, "chunked_prefill_size": 7},
        {"decode_on_device": True},
        {"decode_on_device": True, "enable_overlap": False, "max_running_requests": 2},
    ],
    ids=["1 draft", "3 drafts", "5 drafts", "preempted", "beside recorded steps", "few slots"],
)
def test_greedy_output_does_not_depend_on_drafts_or_batching(
    folder: Path, plain: dict[str, list[int]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(folder, **options)
    sizes: list[int] = []
    launch = DecodeRunner.launch
    monkeypatch.setattr(
        DecodeRunner, "launch", lambda self, batch, *more: sizes.append(len(batch.slots)) or launch(self, batch, *more)
    )
    assert run_all(engine, _requests()) == plain
    assert not sizes or max(sizes) == min(6, engine.config.max_running_requests), "the runner has all sequences"
    stats = engine.stats()
    assert sum(stats.accepted_per_position) > 0 or "decode_on_device" in options
    assert stats.num_preemptions > 0 or "max_total_tokens" not in options


def test_the_policy_may_change_the_number_of_drafts(
    folder: Path, plain: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = iter([3, 0, 0, 1, 5, 0, 2, 4] * 100)
    engine = _engine(folder, num_draft_steps=None)
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: next(choices))
    assert run_all(engine, _requests()) == plain


@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.5}], ids=["", "penalties"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_recorded_steps_draft_where_output_is_greedy(
    tokenizer: Tokenizer, penalties: dict[str, float], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model, whose drafts are good: what the grammar forbids is dropped, and nothing else."""
    grammars = [regex_form(PROSE, "regex", str).as_grammar(), GRAMMARS[1], None]
    starts = ("Once upon a time", "Lily had a red ball. ", "def add(a, b):\n")
    requests = [
        request(f"{text} {i}", tokenizer.encode(text), 60, grammar=grammar, ignore_eos=False, **penalties)
        for text in starts
        for i, grammar in enumerate(grammars)
    ]
    model = checkpoint_dir()
    plain = run_all(_engine(model, num_draft_steps=0), requests)
    cut_off: list[int] = []
    forget = SlotMirror.forget
    monkeypatch.setattr(SlotMirror, "forget", lambda self, seq: cut_off.append(seq.num_output) or forget(self, seq))
    engine = _engine(model, decode_on_device=True, enable_overlap=overlap)
    outputs = run_outputs(engine, requests)
    assert {rid: [token for one in said for token in one.token_ids] for rid, said in outputs.items()} == plain
    assert bool(cut_off) == (not penalties)
    for one in requests:
        steps = [step for said in outputs[one.rid] for step in said.spec_steps]
        assert all(step.num_accepted == step.num_tokens - 1 for step in steps[:-1])
        if one.grammar is not None and penalties:
            assert not any(step.num_drafted for step in steps)
        elif one.grammar == grammars[0] and not one.rid.startswith(starts[2]):
            assert sum(step.num_tokens for step in steps) > 1.5 * len(steps), "drafts are kept"
    assert all(re.fullmatch(PROSE, tokenizer.decode(plain[f"{text} 0"])) for text in starts)


def test_the_policy_hears_of_drafts_that_a_grammar_drops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(DraftLengthPolicy, "choose", lambda *_, **__: 3)
    engine = _engine(folder, num_draft_steps=None, decode_on_device=True)
    monkeypatch.setattr(DraftLengthPolicy, "observe_acceptance", lambda self, *counts: heard.append(counts))
    outputs = run_outputs(engine, [request("a", _prompt(1), 40, grammar=GRAMMARS[0], ignore_eos=False)])
    steps = [step for said in outputs["a"] for step in said.spec_steps]
    assert heard == [(step.num_drafted, step.num_tokens - 1) for step in steps if step.num_drafted]
    assert (3, 0) in heard


def test_the_end_is_taken_behind_what_nothing_can_extend(folder: Path, tokenizer: Tokenizer) -> None:
    """Its matcher has stopped by itself there."""
    engine = _engine(folder)
    ids = tokenizer.encode("aa-1234!")
    assert engine.add(request("a", _prompt(0), 40, grammar=GRAMMARS[0], ignore_eos=False)) is None
    (seq,) = engine.scheduler.sequences
    followed = engine._grammars.followed
    assert followed(seq, [*ids, EOS[1]]) == [*ids, EOS[1]]
    assert followed(seq, [*ids, ids[0]]) == ids
    assert followed(seq, [ids[0], EOS[1]]) == ids[:1]
    assert followed(seq, [ids[-1], ids[0]]) == ids[-1:], "the first was masked"
    assert followed(seq, [*ids, EOS[1]]) == [*ids, EOS[1]], "nothing is kept"


@pytest.mark.parametrize("on_device", [True, False])
def test_sampled_output_keeps_to_its_grammar(folder: Path, tokenizer: Tokenizer, on_device: bool) -> None:
    fields = {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.2, "logit_bias": {EOS[0]: 100.0}}
    for seed in range(4):
        outputs = run_all(_engine(folder, decode_on_device=on_device), _requests(seed=seed, **fields))
        _check_form(outputs, tokenizer)


def test_sampled_output_has_the_masked_distribution(folder: Path, tokenizer: Tokenizer) -> None:
    """Against the target's own probabilities, cut to what a matcher of its own allows."""
    grammar = regex_form("[abc][de]?", "regex", str).as_grammar()
    engine = _engine(folder, max_running_requests=64, max_queued_requests=4000)
    prompt, temperature, num = _prompt(3), 2.0, 1500
    expected = _distribution(engine, tokenizer, grammar, prompt, temperature)
    assert len(expected) > 6
    fields = {"temperature": temperature, "ignore_eos": False, "grammar": grammar}
    requests = [request(str(i), prompt, 8, seed=i, **fields) for i in range(num)]
    found = Counter(tuple(ids) for ids in run_all(engine, requests).values())
    assert sum(engine.stats().accepted_per_position) > 40
    assert set(found) <= set(expected)
    counts = np.array([found[ids] for ids in expected])
    assert stats.chisquare(counts, num * np.array(list(expected.values()))).pvalue > 1e-4


def _distribution(
    engine: Engine, tokenizer: Tokenizer, grammar: str, prompt: list[int], temperature: float
) -> dict[tuple[int, ...], float]:
    """The probability of every output."""
    vocabulary = LLTokenizer(tokenizer.backend.to_str(), n_vocab=2560, eos_token=EOS)
    found: dict[tuple[int, ...], float] = {}
    open_ends: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_ends:
        ids, chance = open_ends.pop()
        matcher = LLMatcher(vocabulary, grammar)
        assert matcher.try_consume_tokens(list(ids)) == len(ids)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        probs = torch.softmax(_logits(engine, [*prompt, *ids])[allowed].double() / temperature, 0).tolist()
        for token, prob in zip(allowed, probs, strict=True):
            if token in EOS:
                found[*ids, token] = chance * prob
            else:
                open_ends.append(((*ids, token), chance * prob))
    return found


def _logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """Of the token after these, by one forward over the pool's first pages, which nothing uses."""
    cycle = engine._cycle
    pages = list(range(-(-len(tokens) // cycle._page_size)))
    batch = make_extend_batch([(0, len(tokens))], [pages], cycle._page_size, torch.device("cpu"))
    with torch.inference_mode():
        hidden = cycle._target.forward(torch.tensor(tokens), batch, cycle._kv_cache)
        return cycle._target.compute_logits(hidden[-1:])[0]


def test_a_grammar_that_gets_too_hard_ends_its_request_alone(folder: Path) -> None:
    engine = _engine(folder)
    (alone,) = run_all(engine, [request("beside", _prompt(2), 30)]).values()
    hard = request("hard", _prompt(1), 30, grammar=GRAMMARS[1], ignore_eos=False)
    assert engine.add(hard) is None
    vocabulary, (seq,) = engine._grammars._tokenizer, engine.scheduler.sequences
    assert vocabulary is not None
    engine._grammars.start(seq, LLMatcher(vocabulary, GRAMMARS[1], limits=LLParserLimits(step_max_items=1)))
    outputs = run_outputs(engine, [request("beside", _prompt(2), 30)], known=["hard"])
    assert [token for output in outputs["beside"] for token in output.token_ids] == alone
    last = outputs["hard"][-1]
    assert (last.finish_reason, last.error_kind) == ("error", "invalid")
    assert last.error is not None
    assert last.error.startswith("the answer's grammar: ")
    said = [token for output in outputs["hard"] for token in output.token_ids]
    assert LLMatcher(vocabulary, GRAMMARS[1]).try_consume_tokens(said) == len(said), "what was not held is not said"


def test_what_cannot_be_served_is_refused(folder: Path, tiny_checkpoint: Path) -> None:
    engine = _engine(folder)
    cases = {
        "ignore_eos": request("a", [1], 5, grammar=GRAMMARS[0]),
        "min_new_tokens": request("b", [1], 5, grammar=GRAMMARS[0], ignore_eos=False, min_new_tokens=2),
        "grammar: ": request("c", [1], 5, grammar="start: unknown", ignore_eos=False),
    }
    for words, one in cases.items():
        refusal = engine.add(one)
        assert refusal is not None
        assert (refusal.error_kind, refusal.finish_reason) == ("invalid", "error")
        assert words in (refusal.error or "")
    for other in (_engine(tiny_checkpoint), _engine(folder, serves_grammars=False)):
        refusal = other.add(request("d", [1], 5, grammar=GRAMMARS[0], ignore_eos=False))
        assert refusal is not None
        assert "no tokenizer" in (refusal.error or "")
    assert not engine.has_work


def test_a_tokenizer_that_does_not_fit_the_model_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = write_checkpoint(tmp_path / "small", tiny_config(vocab_size=24), quant="channel")
    shutil.copy(folder / "tokenizer.json", made)
    engine = _engine(made)
    assert "cannot be held to a schema or a grammar" in caplog.text
    assert run_all(engine, [request("a", [1, 2], 5)])["a"]
