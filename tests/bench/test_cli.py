"""The command says what is wrong before it measures."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from nextn.bench_serving import main


@pytest.mark.parametrize("flag", ["--output-file", "--plot"])
def test_a_place_that_cannot_be_written_is_named_before_the_run(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag, str(tmp_path / "missing" / "file"), "--port", "1"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {flag}: {tmp_path}")


def test_a_run_that_is_interrupted_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Coroutine[Any, Any, Any]) -> None:
        run.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("asyncio.run", interrupted)
    assert main(["--port", "1"]) == 130
    assert capsys.readouterr().err == "error: stopped before the end; there are no figures\n"


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "1", "--ready-check-timeout", "1", "--disable-tqdm"]) == 1
    assert "was not ready within 1 s" in capsys.readouterr().err
