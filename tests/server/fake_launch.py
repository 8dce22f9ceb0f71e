"""The launcher with the fake engine in its engine process: ``python -m tests.server.fake_launch FLAGS``."""

from __future__ import annotations

from nextn.config.engine_config import EngineConfig
from nextn.launch_server import leave, main


def run_fake(
    engine_config: EngineConfig, socket_dir: str, parent_pid: int, num_threads: int | None, log_level: str
) -> None:
    """The engine process."""
    from tests.server.fake_engine import run_fake_engine

    run_fake_engine(engine_config, socket_dir, parent_pid, num_threads, log_level)


if __name__ == "__main__":
    leave(main(engine_entry=run_fake))
