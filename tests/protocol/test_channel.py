"""The sockets' directory is private, and its place can hold a socket."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from nextn.errors import ConfigError
from nextn.protocol.channel import EngineEnd, ServerEnd, private_socket_dir


@pytest.mark.parametrize("length", [10, 80, 90, 100, 200])
def test_sockets_are_made_however_long_the_path_of_temporary_files_is(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / ("x" * max(length - len(str(tmp_path)) - 1, 1))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    directory = private_socket_dir()
    try:
        assert directory.stat().st_mode & 0o777 == 0o700
        server = ServerEnd(directory)
        EngineEnd(directory).close()
        server.close()
        assert not list(temporary.iterdir()) or directory.parent == temporary, "nothing is left behind"
    finally:
        shutil.rmtree(directory)


def test_where_nothing_can_be_written_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"no place for the engine's sockets \(.*missing.*\); set TMPDIR"):
        private_socket_dir()
