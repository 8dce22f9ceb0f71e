"""From what the user typed to a folder on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nextn.checkpoint.index import read_index
from nextn.checkpoint.layout import EMBEDDING, HEAD, nextn_prefix
from nextn.config.engine_config import EngineConfig
from nextn.config.model_config import ModelConfig
from nextn.config.server_args import ServerArgs
from nextn.demo import checkpoint_dir
from nextn.errors import CheckpointError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Weights, configs and tokenizers; never code or pickles."""


def resolved_config(args: ServerArgs) -> EngineConfig:
    """The engine's configuration, with a folder on this machine for every checkpoint: the hub's are downloaded.

    No model is the embedded one. Raises CheckpointError as ``resolve_model``, ConfigError as the configuration does.
    """
    model = checkpoint_dir() if args.model_path is None else resolve_model(args.model_path)
    config, draft = args.engine_config(str(model)), args.speculative_draft_model_path
    if draft is None:
        return config
    return replace(config, draft_model_path=str(resolve_draft(draft)))


def model_name(args: ServerArgs, folder: str) -> str:
    """What the model is called where --served-model-name does not say: by its hub name, or by its folder's own name.

    folder: where it is
    """
    if args.model_path is None or local_folder(args.model_path, "--model-path") is not None:
        return Path(folder).resolve().name
    return args.model_path


def resolve_model(name: str, flag: str = "--model-path") -> Path:
    """A folder as it is; any other name from the Hugging Face hub, through its cache.

    flag: what the name was given with, for messages
    Raises CheckpointError if it is neither, or the hub cannot be reached.
    """
    folder = local_folder(name, flag)
    return folder if folder is not None else _downloaded(name, flag, PATTERNS)


def resolve_draft(name: str, flag: str = "--speculative-draft-model-path") -> Path:
    """As ``resolve_model``, of what is needed of a checkpoint to take its NextN layer: of hundreds of GB, a few.

    Raises also ConfigError where config.json cannot be read.
    """
    folder = local_folder(name, flag)
    if folder is not None:
        return folder
    unneeded = _without_draft(_downloaded(name, flag, ("*.json",)))
    return _downloaded(name, flag, ("*.json", "*.safetensors"), unneeded)


def _without_draft(folder: Path) -> list[str]:
    """Files that the index gives neither the NextN layer nor the embedding and head that it would borrow.

    These show whether it is the target's model that it was trained with.
    """
    listed, prefix = read_index(folder), nextn_prefix(ModelConfig.from_pretrained(folder))
    own = {EMBEDDING: f"{prefix}embed_tokens.weight", HEAD: f"{prefix}shared_head.head.weight"}
    borrowed = [name for name, of_layer in own.items() if of_layer not in listed]
    needed = {file for name, file in listed.items() if name.startswith(prefix) or name in borrowed}
    return sorted(set(listed.values()) - needed)


def _downloaded(name: str, flag: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(ignored)))
    except Exception as error:  # the library's own, and those of whichever HTTP client it uses
        raise not_to_be_had(name, flag, error) from None


def not_to_be_had(name: str, flag: str, error: Exception) -> CheckpointError:
    """error: why the hub did not give it"""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return CheckpointError(
        f"{flag} {name}: no such folder, not in the local cache, and not to be had from the hub ({reason}); check the "
        "name and the network, or download the model and give its folder"
    )


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
