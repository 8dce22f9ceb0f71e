"""Of a checkpoint on the hub only configs and headers are fetched, and the doctor says the same of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from nextn.checkpoint import hub_headers
from nextn.checkpoint.hub_headers import copy_headers, folder_with_headers
from nextn.diagnosis.checkup import examine
from nextn.diagnosis.options import DoctorOptions
from nextn.errors import CheckpointError

from tests.broken_checkpoints import BROKEN
from tests.checkpoints import tiny_config, write_checkpoint


class _CountingFiles(DirFileSystem):  # type: ignore[misc]
    """A folder as a remote file system that counts the bytes it gives."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), LocalFileSystem())
        self.num_bytes = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        found: bytes = super().cat_file(path, start, end, **options)
        self.num_bytes += len(found)
        return found


@pytest.mark.parametrize("first", [1, 100, 2**20])
def test_headers_are_copied_whole_and_weights_not_at_all(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_headers, "FIRST_BYTES", max(first, 8))
    there = tmp_path / "there"
    config = tiny_config(vocab_size=60_000)
    write_checkpoint(there / "owner" / "name", config, quant="channel", own_head=True)
    (there / "owner" / "name" / "tokenizer.json").write_text("x" * 1000)
    files = _CountingFiles(there)
    here = tmp_path / "here"
    copy_headers(files, "owner/name", here)
    sizes = {file.name: file.stat().st_size for file in (there / "owner" / "name").glob("*.safetensors")}
    assert {file.name: file.stat().st_size for file in here.glob("*.safetensors")} == sizes
    assert not (here / "tokenizer.json").exists()
    if first < 2**20:
        assert files.num_bytes < 0.02 * sum(sizes.values()), "the embedding and two heads stayed where they are"
    a, b = (examine(DoctorOptions(str(folder), {})) for folder in (there / "owner" / "name", here))
    assert (a.exit_code, a.report, a.memory) == (b.exit_code, b.report, b.memory)


@pytest.mark.parametrize("name", [name for name, broken in BROKEN.items() if not broken.is_deep])
def test_what_is_refused_is_refused_from_headers_too(name: str, tmp_path: Path) -> None:
    there = BROKEN[name].write(tmp_path / "owner" / "name")
    copy_headers(DirFileSystem(str(tmp_path), LocalFileSystem()), "owner/name", tmp_path / "here")
    whole, headers = (examine(DoctorOptions(str(f), {})).refusal or "" for f in (there, tmp_path / "here"))
    assert headers.replace(str(tmp_path / "here"), str(there)) == whole


def test_the_copy_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    write_checkpoint(tmp_path / "owner" / "name", tiny_config())
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: DirFileSystem(str(tmp_path), LocalFileSystem()))
    monkeypatch.chdir(os.path.sep)
    with folder_with_headers("owner/name", "CHECKPOINT") as folder:
        assert (folder / "config.json").is_file()
    assert not folder.exists()
    found = examine(DoctorOptions("owner/name", {"speculative_draft_model_path": "owner/name"}))
    assert (found.exit_code, found.command) == (
        0,
        "python -m nextn.launch_server --model-path owner/name --speculative-draft-model-path owner/name",
    )


def test_a_name_that_the_hub_does_not_know_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: DirFileSystem(str(tmp_path), LocalFileSystem()))
    with (
        pytest.raises(CheckpointError, match=r"CHECKPOINT owner/name: no such folder, .* \(FileNotFoundError"),
        folder_with_headers("owner/name", "CHECKPOINT"),
    ):
        pass
