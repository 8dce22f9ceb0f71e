"""The errors that a user or a file can cause. Each message names the thing, what was found, expected, and to do."""

from __future__ import annotations


class NextnError(Exception):
    """Base of all errors whose message is meant for the person who runs or calls the server."""


class ConfigError(NextnError):
    """A flag, an environment variable, a YAML entry or a config.json field is wrong."""


class CheckpointError(NextnError):
    """The files of a checkpoint do not fit the model: missing, doubled, unread, corrupt or of the wrong shape."""


class QuantizationError(CheckpointError):
    """The quantization a checkpoint declares, contains or is asked for cannot be honoured."""


class PeerLost(NextnError):
    """Another rank of the group is gone or does not answer."""


class RequestError(NextnError):
    """A request cannot be served as asked.

    param: the field at fault, if one is; code: the OpenAI error code
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.param = param
        self.code = code
