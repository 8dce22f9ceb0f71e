"""Room for connections."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.processes import launched

LIMITED = """
import logging, resource, sys
from nextn.server.listening import make_room_for_connections
soft, hard, max_in_flight = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
logging.basicConfig(stream=sys.stdout, format="%(message)s")
make_room_for_connections(max_in_flight)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def with_limits(soft: int, hard: int, max_in_flight: int) -> list[str]:
    arguments = map(str, (soft, hard, max_in_flight))
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    assert with_limits(100, 512, 300) == ["(512, 512)"]


def test_a_limit_that_stays_too_low_is_one_line() -> None:
    warning, limits = with_limits(100, 512, 500)
    assert "512 open files" in warning
    assert "500 requests" in warning
    assert limits == "(512, 512)"


def test_a_server_starts_with_more_room_than_it_was_given(model_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 200
    if hard <= few:
        pytest.skip("there is nothing to raise")
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with launched("--model-path", str(model_path)) as server:
            server.wait_ready()
            now, _ = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert now > few
