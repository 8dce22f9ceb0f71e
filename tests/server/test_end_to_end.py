"""The embedded model behind the real server, started as a person starts it: ``python -m nextn.launch_server``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import wait_until
from tests.server.processes import Launched, launched
from tests.server.test_admin import samples
from tests.server.test_connections import open_connection

HELLO: list[Any] = [{"role": "user", "content": "Hello! Who are you?"}]
GREEDY = {"temperature": 0.0, "max_new_tokens": 40, "ignore_eos": True}
MODULE = "nextn.launch_server"
SMALL = ("--max-total-tokens", "32768", "--served-model-name", "demo")


@pytest.fixture(scope="module")
def server() -> Iterator[Launched]:
    with launched(*SMALL, module=MODULE) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(server: Launched) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=server.http)


def test_the_ready_block_has_a_command_that_works(server: Launched) -> None:
    command = "".join(server.out).partition("Try:\n")[2]
    assert os.waitstatus_to_exitcode(os.system(f"{command.strip()} -sf -o /dev/null".replace("\\\n", " "))) == 0


def test_a_chat_streams_what_it_answers_in_one_piece(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "demo", "messages": HELLO, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields))
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert joined == (whole.choices[0].message.content or "")
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_response_is_the_chat_of_the_same_conversation(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
    response = client.responses.create(model="demo", input=HELLO, temperature=0, max_output_tokens=60)
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert response.usage is not None
    assert response.usage.output_tokens == chat.usage.completion_tokens


def test_a_repeated_prompt_is_found_in_the_cache(server: Launched, client: openai.OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    cached = []
    for _ in range(2):
        usage = client.completions.create(model="demo", prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[0] == 0 < cached[1]
    assert server.http.post("/flush_cache").status_code == 200
    usage = client.completions.create(model="demo", prompt=prompt, max_tokens=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_seed_makes_an_answer_repeatable_and_choices_differ(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "demo",
        "prompt": "Once",
        "n": 3,
        "seed": 7,
        "temperature": 1.5,
        "max_tokens": 20,
    }
    first = [choice.text for choice in client.completions.create(**fields).choices]
    again = [choice.text for choice in client.completions.create(**fields).choices]
    assert first == again
    assert len(set(first)) == 3
    single = client.completions.create(**{**fields, "n": 1, "seed": 8}).choices[0].text
    assert single == first[1]


def test_prompt_logprobs_are_the_same_as_those_of_generation(server: Launched) -> None:
    """Score a greedy continuation as a prompt: each token's logprob is what it was when it was generated."""
    body = {"input_ids": [60, 61, 62], "sampling_params": {**GREEDY, "max_new_tokens": 12}, "return_logprob": True}
    generated = server.http.post("/generate", json=body).json()
    whole = [60, 61, 62, *generated["output_ids"]]
    scored = server.http.post(
        "/generate",
        json={
            "input_ids": whole,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 3,
        },
    ).json()
    expected = generated["meta_info"]["output_token_logprobs"]
    found = scored["meta_info"]["input_token_logprobs"]
    assert [triple[1] for triple in found] == [triple[1] for triple in expected]
    # float32 sums in a different order for a batch of rows than for one row
    assert [triple[0] for triple in found] == pytest.approx([triple[0] for triple in expected], abs=2e-3)


def test_speculation_is_counted_per_request_and_in_the_metrics(server: Launched) -> None:
    before = samples(server.http.get("/metrics"))
    own_seed = {"temperature": 0.2, "seed": 1, "max_new_tokens": 40, "ignore_eos": True}  # 3 drafts in every step
    meta = server.http.post("/generate", json={"text": "Hello", "sampling_params": own_seed}).json()["meta_info"]
    assert meta["completion_tokens"] == 40
    assert meta["spec_accept_length"] == 40 / meta["spec_verify_ct"] > 1
    after = samples(server.http.get("/metrics"))
    names = ("spec_num_drafts", "spec_num_draft_tokens", "spec_num_accepted_tokens", "generation_tokens")
    passes, drafted, accepted, generated = (
        after[f"nextn:{name}_total"] - before.get(f"nextn:{name}_total", 0) for name in names
    )
    assert generated == 40
    assert 0 < accepted <= drafted <= 3 * meta["spec_verify_ct"]
    assert passes <= meta["spec_verify_ct"]
    assert (drafted, accepted) == tuple(map(sum, list(zip(*meta["spec_steps"], strict=True))[:2]))
    assert server.http.get("/get_server_info").json()["engine"]["num_draft_steps"] == 5


def test_a_client_that_leaves_frees_its_pages(server: Launched) -> None:
    body = {"text": "Hello", "sampling_params": {**GREEDY, "max_new_tokens": 3000}, "stream": True}
    connection = open_connection(server.url, "/generate", body)
    wait_until(lambda: load(server)["num_reqs"] == 1)
    connection.close()
    wait_until(lambda: load(server) == {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}, 5)


def load(server: Launched) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/get_load").json()[0]
    return found


def test_health_generate_runs_the_model(server: Launched) -> None:
    assert server.http.get("/health_generate").status_code == 200


def test_only_the_engine_process_loads_torch(server: Launched) -> None:
    """But for what the oldest releases of transformers load to read a tokenizer."""
    reads_tokenizer = "import sys; from transformers import PreTrainedTokenizerFast; sys.exit('torch' in sys.modules)"
    loads_torch = subprocess.run([sys.executable, "-c", reads_tokenizer], timeout=60, check=False).returncode
    if not loads_torch:
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()


def test_random_traffic_with_aborts_and_leavers_leaves_nothing_running(server: Launched) -> None:
    statuses: set[int] = set()

    async def visitor(client: httpx.AsyncClient, rng: random.Random) -> None:
        for number in range(6):
            body = {
                "prompt": [rng.randrange(10, 2000) for _ in range(rng.randrange(1, 100))],
                "max_tokens": rng.randrange(1, 60),
                "n": rng.randrange(1, 4),
                "stream": rng.random() < 0.6,
                "stop": rng.choice([None, "e", " the"]),
                "rid": f"visit-{id(rng)}-{number}",
            }
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() / 5)
                asking.cancel()
            elif rng.random() < 0.3:
                await asyncio.sleep(rng.random() / 5)
                await client.post("/abort_request", json={"rid": body["rid"]})
            with contextlib.suppress(asyncio.CancelledError):
                statuses.add((await asking).status_code)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, verify=False) as client:
            await asyncio.gather(*(visitor(client, random.Random(seed)) for seed in range(8)))

    asyncio.run(run())
    assert statuses == {200}
    wait_until(lambda: load(server) == {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}, 5)


def long_stream(server: Launched) -> tuple[threading.Thread, list[str]]:
    payloads: list[str] = []

    def read() -> None:
        body = {"text": "Hello", "sampling_params": {**GREEDY, "max_new_tokens": 3000}, "stream": True}
        with server.http.stream("POST", "/generate", json=body) as response:
            payloads.extend(line.removeprefix("data: ") for line in response.iter_lines() if line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_until(lambda: bool(payloads))
    return thread, payloads


def test_ctrl_c_in_mid_stream_ends_the_stream_with_an_error_and_leaves_nothing() -> None:
    with launched(*SMALL, "--shutdown-timeout", "0.2", module=MODULE) as server:
        server.wait_ready()
        thread, payloads = long_stream(server)
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        thread.join(5)
        assert "shut down" in json.loads(payloads[-1])["error"]["message"]
        assert "Traceback" not in "".join(server.err)


def test_the_death_of_the_real_engine_ends_stream_and_server() -> None:
    with launched(*SMALL, module=MODULE) as server:
        server.wait_ready()
        thread, payloads = long_stream(server)
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.wait() == 1
        thread.join(5)
        assert "SIGKILL" in json.loads(payloads[-1])["error"]["message"]


def test_a_broken_checkpoint_is_one_line_and_code_1(tmp_path: os.PathLike[str]) -> None:
    with launched("--model-path", str(tmp_path), "--skip-tokenizer-init", module=MODULE) as server:
        assert server.wait() == 1
        assert server.err[-1].startswith("nextn: error: ")
        assert "config.json" in server.err[-1]
        assert "Traceback" not in "".join(server.err)
