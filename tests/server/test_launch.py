"""The launcher: how a server starts, what it says, and how it ends."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import wait_until
from tests.server.processes import Launched, free_port, launched


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
