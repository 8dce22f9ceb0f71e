"""A real HTTP server on a free port, around the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
import uvloop
from nextn.config.server_args import ServerArgs
from nextn.demo import checkpoint_dir
from nextn.protocol.channel import ServerEnd, private_socket_dir
from nextn.protocol.messages import AddRequest
from nextn.server.app import create_app
from nextn.server.engine_client import EngineClient, EngineState
from nextn.server.http_protocol import CappedHttpProtocol
from nextn.server.listening import listen
from nextn.server.metrics import Metrics
from nextn.server.sampling import SamplingDefaults
from nextn.server.services import Services
from nextn.text.grammar_compiler import GrammarProver
from nextn.text.tokenizer import Tokenizer
from starlette.types import ASGIApp

from tests.server.fake_engine import Behaviour, FakeEngine, start_in_thread

MODEL = "demo"


@dataclass(frozen=True)
class App:
    """A server that runs in a thread of this process, and the fake engine behind it."""

    url: str
    engine: FakeEngine
    services: Services
    asgi: ASGIApp
    loop: asyncio.AbstractEventLoop

    def run_in_server(self, call: Callable[[], object]) -> None:
        """Call a function on the server's event loop."""
        self.loop.call_soon_threadsafe(call)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, verify=False)  # verify loads certificates, slowly

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.http)

    @property
    def added(self) -> list[AddRequest]:
        """The engine requests that the engine has received."""
        return [message for message in self.engine.log if isinstance(message, AddRequest)]

    def wait_until_idle(self) -> None:
        wait_until(lambda: not self.engine.running and not self.services.engine.num_running)


AppFactory = Callable[..., App]


@pytest.fixture(scope="session")
def model_path() -> Path:
    return checkpoint_dir()


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer(str(model_path))


@contextlib.contextmanager
def run_app(
    model_path: Path, tokenizer: Tokenizer | None, behaviour: Behaviour, flags: tuple[str, ...], wait: bool = True
) -> Iterator[App]:
    """Serve until the block ends."""
    arguments = ["--model-path", str(model_path), "--served-model-name", MODEL, "--enable-metrics", *flags]
    args = ServerArgs.from_cli(arguments, {})
    directory = private_socket_dir()
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    made: list[tuple[Services, ASGIApp, uvicorn.Server, asyncio.AbstractEventLoop]] = []
    up = threading.Event()

    async def serve() -> None:
        metrics = Metrics()
        client = EngineClient(ServerEnd(directory), metrics, args.max_requests_in_flight)
        services = Services(
            args=args,
            model_path=str(model_path),
            served_model_name=MODEL,
            engine=client,
            metrics=metrics,
            tokenizer=tokenizer,
            prover=GrammarProver(model_path),
            defaults=SamplingDefaults(),
        )
        app = create_app(services)
        config = uvicorn.Config(
            app, http=CappedHttpProtocol, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        client.start()
        made.append((services, app, server, asyncio.get_running_loop()))
        up.set()
        await server.serve(sockets=[listener])
        await client.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as launch_server does
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert up.wait(10)
    engine, engine_thread, stop = start_in_thread(directory, behaviour)
    services, app, server, loop = made[0]
    try:
        if wait:
            wait_until(lambda: services.engine.state is EngineState.READY)
        yield App(url, engine, services, app, loop)
    finally:
        server.should_exit = True
        thread.join(10)
        stop.set()
        engine_thread.join(5)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_app(model_path: Path, tokenizer: Tokenizer) -> Iterator[App]:
    """One server for all tests that neither set flags nor break it."""
    with run_app(model_path, tokenizer, Behaviour(), ()) as running:
        yield running


@pytest.fixture
def app(shared_app: App) -> App:
    """The shared server, its engine idle, well-behaved and without memory."""
    shared_app.wait_until_idle()
    shared_app.engine.reset(Behaviour())
    return shared_app


@pytest.fixture
def make_app(app: App, model_path: Path, tokenizer: Tokenizer) -> Iterator[AppFactory]:
    """Gives servers: ``make_app(*flags, behaviour=Behaviour(...))``; new ones end with the test.

    fresh: a server of one's own, for tests that break it or read totals
    """
    with contextlib.ExitStack() as stack:

        def make(
            *flags: str,
            behaviour: Behaviour | None = None,
            with_tokenizer: bool = True,
            wait: bool = True,
            fresh: bool = False,
        ) -> App:
            wanted = behaviour or Behaviour()
            if not flags and with_tokenizer and wait and not fresh:
                app.engine.reset(wanted)
                return app
            used = tokenizer if with_tokenizer else None
            return stack.enter_context(run_app(model_path, used, wanted, flags, wait))

        yield make


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Return as soon as ``condition`` holds; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
