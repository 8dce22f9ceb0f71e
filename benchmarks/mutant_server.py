"""The ordinary server with a fault in its engine: ``python -m benchmarks.mutant_server FAULT [server flags]``."""

from __future__ import annotations

import sys
from functools import partial

from nextn import launch_server
from nextn.config.engine_config import EngineConfig


def run_mutant(
    fault: str, engine_config: EngineConfig, socket_dir: str, parent_pid: int, num_threads: int | None, log_level: str
) -> None:
    """Entry point of the engine process: patch it, then run the engine as ever."""
    from nextn.execution.engine_process import run_engine

    from benchmarks.mutants import MUTANTS

    MUTANTS[fault].apply()
    run_engine(engine_config, socket_dir, parent_pid, num_threads, log_level)


if __name__ == "__main__":
    sys.exit(launch_server.main(sys.argv[2:], engine_entry=partial(run_mutant, sys.argv[1])))
