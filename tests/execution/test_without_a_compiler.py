"""Where the installation had no C compiler, torch serves in place of the compiled kernels, and the log says so."""

from __future__ import annotations

import types

import pytest
from nextn import LLM, SamplingParams, kernels
from nextn.kernels import native

GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


def test_torch_gives_the_same_answer_and_the_log_tells_why_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_compiled = native.cpu is not None
    (before,) = LLM().generate("Once upon a time", GREEDY)
    assert ("C compiler" in caplog.text) is not is_compiled
    caplog.clear()
    monkeypatch.setattr(native, "cpu", None)
    (without,) = LLM().generate("Once upon a time", GREEDY)
    assert [record.levelname for record in caplog.records if "C compiler" in record.getMessage()] == ["WARNING"]
    assert without.output_ids == before.output_ids


def test_kernels_that_another_version_compiled_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a pull of an editable installation."""
    old = types.ModuleType("_cpu")
    monkeypatch.setattr(kernels, "_cpu", old, raising=False)
    assert native.load() is None
    monkeypatch.setattr(old, "interface", native.INTERFACE, raising=False)
    assert native.load() is old
