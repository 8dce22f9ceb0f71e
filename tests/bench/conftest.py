"""A real HTTP server that speaks the three protocols with known token counts and timing."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

GAP = 0.03  # seconds between chunks
TOKENS_PER_CHUNK = 2


@dataclass
class FakeServer:
    """mode: what goes wrong; a JSON object is the only event of every answer"""

    url: str = ""
    mode: str = "ok"
    passes: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        index = len(self.bodies)
        if self.mode.startswith("{"):
            return web.Response(body=f"data: {self.mode}\n\ndata: [DONE]\n\n".encode("latin-1"))
        if self.mode == "fail" or (self.mode == "every-other" and index % 2 == 0):
            return web.json_response({"error": {"message": "queue full"}}, status=429)
        native = request.path == "/generate"
        chat = request.path.startswith("/v1/chat")
        num = (
            body["sampling_params"]["max_new_tokens"]
            if native
            else body.get("max_tokens", body.get("max_completion_tokens"))
        )
        usage = {"prompt_tokens": 7, "completion_tokens": num}
        if not body["stream"]:
            if native:
                return web.json_response({"text": "a " * num, "meta_info": usage})
            return web.json_response({"choices": [{"text": "a " * num}], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if chat:
            await self.write(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for done in range(TOKENS_PER_CHUNK, num + 1, TOKENS_PER_CHUNK):
            await asyncio.sleep(GAP)
            self.passes += 1
            piece = "é " * TOKENS_PER_CHUNK
            if native:
                meta = {"prompt_tokens": 7, "completion_tokens": done}
                await self.write(response, {"text": "é " * done, "meta_info": meta})
            else:
                await self.write(response, {"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
            if self.mode == "error-event":
                await self.write(response, {"error": {"message": "engine died"}})
                return response
        if self.mode == "cut":
            return response
        if not native:
            await self.write(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def write(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n".encode()
        middle = data.find("é".encode()) + 1 or len(data) // 2  # inside a UTF-8 character where there is one
        await response.write(data[:middle])
        await asyncio.sleep(0.002)
        await response.write(data[middle:])

    async def info(self, request: web.Request) -> web.Response:
        accepted = self.passes * (TOKENS_PER_CHUNK - 1)
        stats = {"num_verify_passes": self.passes, "accepted_per_position": [accepted]}
        return web.json_response({"vocab_size": 500, "stats": stats})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "known-model"}]})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/get_server_info", self.info)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self.answer)
        return app


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(fake.app())
        await runner.setup()
        await web.SockSite(runner, listener).start()
        ready.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog again and again"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(path)
    return str(path)
