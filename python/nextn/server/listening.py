"""The listening socket, made before anything slow so that a port in use costs no loading time, and room for others."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket

from nextn.errors import ConfigError

BACKLOG = 2048

OPEN_FILES = 65536
"""What the limit of open files is raised to where it may be: each connection is one."""

OTHER_FILES = 128
"""Open files of the server that are no connections of requests."""

logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit it
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listener


def make_room_for_connections(max_in_flight: int) -> None:
    """Raise the process's soft limit of open files, and warn if it does not suffice for ``max_in_flight`` requests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < max_in_flight + OTHER_FILES:
        logger.warning(
            "the limit of %d open files is too low for the %d requests that may run and wait; raise it (ulimit -Hn)",
            soft,
            max_in_flight,
        )
