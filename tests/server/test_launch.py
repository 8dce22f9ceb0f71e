"""The launcher: how a server starts, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from nextn.server.serving import FLUSH_TIMEOUT

from tests.server.conftest import wait_until
from tests.server.processes import Launched, free_port, launched
from tests.server.test_errors import check_error


@pytest.fixture(scope="module")
def model(model_path: Path) -> tuple[str, str]:
    return ("--model-path", str(model_path))


def stream_in_background(server: Launched, max_new_tokens: int) -> tuple[threading.Thread, list[str]]:
    """Start a stream; returns its thread and the payloads of its events so far."""
    payloads: list[str] = []
    params = {"max_new_tokens": max_new_tokens, "ignore_eos": True}

    def read() -> None:
        body = {"text": "one two", "stream": True, "sampling_params": params}
        with server.http.stream("POST", "/generate", json=body) as response:
            payloads.extend(line.removeprefix("data: ") for line in response.iter_lines() if line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_until(lambda: bool(payloads))
    return thread, payloads


def test_a_model_of_the_hub_is_served_by_its_hub_name(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its folder's in the cache, which is the name of a commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--GLM-small"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(model_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with launched("--model-path", "owner/GLM-small") as server:
        server.wait_ready()
        assert f"nextn is ready: owner/GLM-small at {server.url}" in "".join(server.out)
        (card,) = server.http.get("/v1/models").json()["data"]
        assert card["id"] == "owner/GLM-small"
        info = server.http.get("/get_model_info").json()
        assert info["model_path"] == "owner/GLM-small"
        assert Path(info["tokenizer_path"]).is_dir()
        server.signal(signal.SIGINT)
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_an_idle_server_with_code_0_and_nothing_left(model: tuple[str, str], number: int) -> None:
    with launched(*model, "--served-model-name", "m") as server:
        server.wait_ready()
        block = "".join(server.out)
        assert f"nextn is ready: m at {server.url}" in block
        assert f"curl {server.url}/v1/chat/completions" in block
        assert server.http.get("/health").status_code == 200
        started = time.monotonic()
        server.signal(number)
        assert server.wait() == 0
        assert time.monotonic() - started < 3


def test_while_the_model_loads_the_server_answers_503(model: tuple[str, str]) -> None:
    with launched(*model, fake="load_seconds=6") as server:
        wait_until(lambda: answers(server), 20)
        assert server.http.get("/health").status_code == 503
        assert not server.is_ready
        server.wait_ready()
        assert server.http.get("/health").status_code == 200


def answers(server: Launched) -> bool:
    try:
        server.http.get("/")
    except httpx.TransportError:
        return False
    return True


def test_a_stream_that_can_finish_in_time_finishes_after_ctrl_c(model: tuple[str, str]) -> None:
    with launched(*model, "--shutdown-timeout", "10", fake="step_seconds=0.02") as server:
        server.wait_ready()
        thread, payloads = stream_in_background(server, 100)
        server.signal(signal.SIGINT)
        wait_until(lambda: not answers(server))
        thread.join(10)
        assert payloads[-1] == "[DONE]"
        assert json.loads(payloads[-2])["meta_info"]["completion_tokens"] == 100
        assert server.wait() == 0


def test_a_stream_that_cannot_finish_in_time_ends_with_an_error_event(model: tuple[str, str]) -> None:
    with launched(*model, "--shutdown-timeout", "0.3", fake="step_seconds=0.1") as server:
        server.wait_ready()
        thread, payloads = stream_in_background(server, 500)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        thread.join(5)
        assert "shut down" in json.loads(payloads[-1])["error"]["message"]


def test_a_second_ctrl_c_does_not_wait_for_streams(model: tuple[str, str]) -> None:
    with launched(*model, "--shutdown-timeout", "60", fake="step_seconds=0.1") as server:
        server.wait_ready()
        thread, payloads = stream_in_background(server, 500)
        server.signal(signal.SIGINT)
        wait_until(lambda: not answers(server))
        server.signal(signal.SIGINT)
        assert server.wait(10) == 0
        thread.join(5)
        assert "error" in json.loads(payloads[-1])


def hostile_grammar(tag: int) -> str:
    """One that takes minutes to compile."""
    terms = (rf"/(.|\n)*{chr(97 + i)}.{{{10 + i}}}{chr(98 + i)}(.|\n)*/" for i in range(12))
    return f"// {tag}\nstart: A\nA: {' & '.join(terms)}"


@pytest.mark.parametrize(("num_signals", "timeout"), [(1, "0.2"), (2, "60")], ids=["deadline", "second signal"])
def test_a_request_that_is_still_planned_at_the_end_gets_a_503(
    model: tuple[str, str], num_signals: int, timeout: str
) -> None:
    """Six grammars are tried for 2 s each, one after the other; the server does not wait for that."""
    answers: list[httpx.Response] = []

    def ask(tag: int) -> None:
        body = {"prompt": "x", "max_tokens": 1, "ebnf": hostile_grammar(tag)}
        answers.append(server.http.post("/v1/completions", json=body))

    with launched(*model, "--shutdown-timeout", timeout) as server:
        server.wait_ready()
        threads = [threading.Thread(target=ask, args=(tag,), daemon=True) for tag in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(server.children()) > 2)  # the engine, multiprocessing's tracker, who tries grammars
        time.sleep(0.5)  # the other five are planned too
        begun_at = time.monotonic()
        for _ in range(num_signals):
            os.kill(server.process.pid, signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun_at < 9
        for thread in threads:
            thread.join(5)
        assert len(answers) == 6
        refused = [answer for answer in answers if answer.status_code != 400]
        assert len(refused) > 1
        for answer in refused:
            check_error(answer, 503, None, "unavailable")
        assert not [line for line in server.err if " ERROR " in line or "Traceback" in line]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_reads_slowly_gets_its_whole_answer_at_the_end(model: tuple[str, str], stream: bool) -> None:
    params = {"max_new_tokens": 450, "n": 20, "ignore_eos": True}
    body = {"text": "one two", "stream": stream, "sampling_params": params, "return_logprob": True}
    payload = json.dumps({**body, "top_logprobs_num": 20, "return_text_in_logprobs": True}).encode()
    with launched(*model, "--shutdown-timeout", "60", fake="tokens_per_step=5") as server, socket.socket() as slow:
        server.wait_ready()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(("127.0.0.1", httpx.URL(server.url).port))
        slow.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(payload), payload))
        received = slow.recv(1)  # the answer has begun
        wait_until(lambda: server.http.get("/get_load").json()[0]["num_reqs"] == 0)
        os.kill(server.process.pid, signal.SIGTERM)
        time.sleep(FLUSH_TIMEOUT * 2 + 1)
        received += b"".join(iter(lambda: slow.recv(1 << 20), b""))
        assert server.wait() == 0
    head, _, rest = received.partition(b"\r\n\r\n")
    if stream:
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        assert f"content-length: {len(rest)}".encode() in head.splitlines()


def test_a_request_whose_body_has_not_come_does_not_hold_up_the_end(model: tuple[str, str]) -> None:
    with launched(*model, "--shutdown-timeout", "60") as server, socket.socket() as client:
        server.wait_ready()
        client.settimeout(30)
        client.connect(("127.0.0.1", httpx.URL(server.url).port))
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        server.http.get("/health")  # the server has read what came before
        server.signal(signal.SIGTERM)
        assert b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert server.wait() == 0


def test_ctrl_c_while_loading_ends_at_once(model: tuple[str, str]) -> None:
    with launched(*model, fake="load_seconds=30") as server:
        wait_until(lambda: answers(server), 20)
        server.signal(signal.SIGINT)
        assert server.wait(10) == 0


def test_an_engine_that_leaves_by_itself_ends_the_server_with_its_exit_code(model: tuple[str, str]) -> None:
    with launched(*model, fake="step_seconds=0.01,die_after_tokens=6") as server:
        server.wait_ready()
        thread, payloads = stream_in_background(server, 500)
        assert server.wait() == 1
        thread.join(5)
        assert "exit code 7" in json.loads(payloads[-1])["error"]["message"]


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(model: tuple[str, str]) -> None:
    with launched(*model, fake="fail_loading=layer 3 has no weight_scale") as server:
        assert server.wait() == 1
        assert server.err[-1] == "nextn: error: layer 3 has no weight_scale\n"
        assert "Traceback" not in "".join(server.err)


def test_a_model_that_does_not_load_in_time_ends_the_server(model: tuple[str, str]) -> None:
    with launched(*model, "--startup-timeout", "1", fake="load_seconds=30") as server:
        assert server.wait() == 1
        assert "--startup-timeout" in server.err[-1]


def test_an_engine_that_makes_no_step_ends_the_server(model: tuple[str, str]) -> None:
    with launched(*model, "--watchdog-timeout", "1", fake="step_seconds=0.01,hang_after_tokens=6") as server:
        server.wait_ready()
        time.sleep(1.2)  # an idle engine says nothing and is fine
        thread, payloads = stream_in_background(server, 500)
        assert server.wait() == 1
        thread.join(5)
        assert "--watchdog-timeout" in json.loads(payloads[-1])["error"]["message"]
        assert "--watchdog-timeout" in server.err[-1]


def test_an_engine_that_stops_is_found_although_its_clients_have_left(model: tuple[str, str]) -> None:
    with launched(*model, "--watchdog-timeout", "1", fake="step_seconds=0.01,hang_after_tokens=6") as server:
        server.wait_ready()
        body = {"text": "one two", "stream": True, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
        with server.http.stream("POST", "/generate", json=body) as response:
            payloads = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line)
            assert any(payload["meta_info"]["completion_tokens"] >= 6 for payload in payloads)
        assert server.wait() == 1
        assert "--watchdog-timeout" in server.err[-1]


def test_the_death_of_the_server_ends_the_engine(model: tuple[str, str]) -> None:
    with launched(*model) as server:
        server.wait_ready()
        server.process.kill()
        wait_until(lambda: not server.children())


def test_a_port_in_use_is_one_line_and_code_1_before_loading(model: tuple[str, str]) -> None:
    port = free_port()
    with httpx.Client(), launched(*model, port=port) as first:
        wait_until(lambda: answers(first), 20)
        with launched(*model, port=port) as second:
            assert second.wait() == 1
            assert second.err == [
                f"nextn: error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
            ]


def test_wrong_arguments_are_one_line_and_code_2() -> None:
    with launched("--no-such-flag", "1") as server:
        assert server.wait() == 2
        assert len(server.err) == 1
        assert "--no-such-flag" in server.err[0]


def test_a_folder_that_does_not_exist_is_one_line_and_code_1() -> None:
    with launched("--model-path", "./no/such/folder") as server:
        assert server.wait() == 1
        assert server.err[-1].startswith("nextn: error: ")
        assert "no/such/folder" in server.err[-1]


def test_help_names_the_flags_and_ends_with_code_0() -> None:
    with launched("--help") as server:
        assert server.wait() == 0
        assert "--shutdown-timeout" in "".join(server.out)
