"""Logging for an operator: one line per event, on stderr."""

from __future__ import annotations

import logging
import sys
import traceback


class LineFormatter(logging.Formatter):
    """``time level logger message``, and an exception as one more piece of the same line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace("\r", "\\r")
        return line.replace("\n", "\\n")

    def formatException(self, ei: object) -> str:
        error = ei[1] if isinstance(ei, tuple) else None
        if not isinstance(error, BaseException):
            return ""
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
        return f"error={error!r} at={where}"


def configure_logging(level: str) -> None:
    """Send every log line of the process to stderr; libraries only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nextn").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
