"""From what the user typed to a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from nextn.errors import CheckpointError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Weights, configs and tokenizers; never code or pickles."""


def resolve_model(name: str, flag: str = "--model-path") -> Path:
    """A folder as it is; any other name from the Hugging Face hub, through its cache.

    flag: what the name was given with, for messages
    Raises CheckpointError if it is neither, or the hub cannot be reached.
    """
    folder = local_folder(name, flag)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except HFValidationError as error:
        raise CheckpointError(f"{flag} {name}: no such folder, and no valid hub name: {error}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{flag} {name}: no such folder, not in the local cache, and the hub cannot be reached; "
            "check the network, or download the model and give its folder"
        ) from None
    except (HTTPError, OSError) as error:
        raise CheckpointError(f"{flag} {name}: no such folder, and the hub says: {error}") from None


def local_folder(name: str, flag: str) -> Path | None:
    """The folder that ``name`` is on this machine; None if it may be a hub name.

    Raises CheckpointError if it is neither.
    """
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{flag} {name}: cannot be read ({error}); give a folder or a hub name") from None
    if is_folder:
        return path
    if exists:
        raise CheckpointError(f"{flag} {name}: is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{flag} {name}: there is no such folder, and it is no hub name of the form owner/name")
    return None
