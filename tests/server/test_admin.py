"""Health, information, metrics, cache and keys."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import MODEL, App, AppFactory, wait_until
from tests.server.fake_engine import CONTEXT_LENGTH, VOCAB_SIZE, Behaviour
from tests.server.test_errors import check_error


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_health_says_ok_once_the_model_is_loaded(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(load_seconds=0.5), wait=False)
    assert app.http.get("/health").status_code == 503
    wait_until(lambda: app.http.get("/health").status_code == 200)


def test_health_generate_makes_the_engine_work(make_app: AppFactory) -> None:
    app = make_app()
    assert app.http.get("/health_generate").status_code == 200
    assert app.engine.num_tokens == 1
    app.engine.reset(Behaviour(error_after_tokens=0))
    check_error(app.http.get("/health_generate"), 500, None)


@pytest.mark.parametrize(
    ("flags", "behaviour"),
    [
        ((), Behaviour(batch_limit=1)),
        ((), Behaviour(queue_limit=1)),
        (("--max-running-requests", "1", "--max-queued-requests", "1"), Behaviour(batch_limit=1)),
    ],
    ids=["waiting", "refused by the engine", "refused by the server"],
)
def test_an_engine_that_steps_for_others_is_alive_without_room_for_more(
    make_app: AppFactory, flags: tuple[str, ...], behaviour: Behaviour
) -> None:
    app = make_app(*flags, behaviour=dataclasses.replace(behaviour, step_seconds=0.05, tokens_per_step=1), fresh=True)
    body = {"text": ["a", "b"] if flags else "a", "stream": True, "sampling_params": {"max_new_tokens": 500}}
    with app.http.stream("POST", "/generate", json=body) as running:
        lines = running.iter_lines()  # kept, for without it the response is closed
        next(lines)
        assert app.http.get("/health_generate").status_code == 200
        assert app.engine.num_tokens < 400, "it waited for others to end"


def test_an_engine_that_hangs_with_a_full_queue_is_not_alive(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextn.server.admin.HEALTH_GENERATE_TIMEOUT", 0.3)
    app = make_app("--max-running-requests", "1", "--max-queued-requests", "1")
    app.engine.behaviour.hang_after_tokens = 1
    body = {"text": ["a", "b"], "stream": True, "sampling_params": {"max_new_tokens": 500}}
    with app.http.stream("POST", "/generate", json=body) as running:
        lines = running.iter_lines()  # kept, for without it the response is closed
        next(lines)
        check_error(app.http.get("/health_generate"), 503, None, "unavailable")


def test_probes_are_not_counted_as_requests(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(tokens_per_step=1), fresh=True)
    assert app.http.get("/health_generate").status_code == 200
    assert app.engine.num_tokens == 1
    found = samples(app.http.get("/metrics"))
    for histogram in ("time_to_first_token", "queue_time", "e2e_request_latency"):
        assert found[f"nextn:{histogram}_seconds_count"] == 0


def test_models_lists_the_served_model(app: App) -> None:
    (card,) = app.openai.models.list().data
    assert card.id == MODEL
    assert app.openai.models.retrieve(MODEL).id == MODEL
    assert card.max_model_len == CONTEXT_LENGTH  # type: ignore[attr-defined]
    assert card.root == app.services.model_path  # type: ignore[attr-defined]


def test_model_info_describes_the_model(app: App) -> None:
    info = app.http.get("/get_model_info").json()
    assert app.http.get("/model_info").json() == info
    assert info["model_path"] == app.services.model_path
    assert info["served_model_name"] == MODEL
    assert info["vocab_size"] == VOCAB_SIZE


def test_server_info_has_arguments_and_statistics_but_no_key(make_app: AppFactory) -> None:
    app = make_app("--api-key", "secret-one", "--admin-api-key", "secret-two")
    app.http.post("/generate", json={"text": "x"}, headers=bearer("secret-one"))
    response = app.http.get("/get_server_info", headers=bearer("secret-one"))
    info = response.json()
    assert info["engine"] == {"name": "fake"}
    assert info["stats"]["page_size"] == 16
    assert info["stream_interval"] == 1
    assert "secret" not in response.text


def test_server_info_is_found_where_load_generators_look(app: App) -> None:
    """As sglang's: by its old and its new path, with the tokenizer, and the accept length since the start."""
    for path in ("/get_server_info", "/server_info"):
        info = app.http.get(path).json()
        assert info["tokenizer_path"] == info["model_path"] == app.services.model_path
        assert info["internal_states"] == [{"avg_spec_accept_length": info["stats"]["accept_length"] or None}]
    app.http.post("/generate", json={"text": "x"})
    assert app.http.get("/server_info").json()["internal_states"] == [{"avg_spec_accept_length": 2}]


def test_load_counts_running_requests(app: App) -> None:
    (load,) = app.http.get("/get_load").json()
    assert set(load) == {"dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache_asks_the_engine(app: App, method: str) -> None:
    assert app.http.request(method, "/flush_cache").json() == {"flushed": True}


def test_the_page_says_what_this_is_and_how_to_call_it(app: App) -> None:
    page = app.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert f"curl {app.url}/v1/chat/completions" in page.text
    assert MODEL in page.text
    hostile = app.http.get("/", headers={"Host": "<script>alert(1)</script>"})
    assert "<script>" not in hostile.text


def test_abort_all_ends_every_request(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(step_seconds=0.02))
    body = {"text": ["a", "b"], "stream": True, "sampling_params": {"max_new_tokens": 400}}
    with app.http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert app.http.post("/abort_request", json={"abort_all": True}).status_code == 200
        assert sum('"type":"abort"' in line for line in lines) == 2
    app.wait_until_idle()


def test_a_key_is_needed_where_one_is_set(make_app: AppFactory) -> None:
    app = make_app("--api-key", "right")
    for headers in ({}, bearer("wrong"), bearer("right2"), bearer("righ"), {"Authorization": "right"}, bearer("ä")):
        encoded = {name: value.encode() for name, value in headers.items()}
        for path in ("/v1/models", "/generate", "/get_server_info", "/flush_cache", "/openapi.json", "/nope"):
            response = app.http.get(path, headers=encoded)
            check_error(response, 401, None, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/metrics", "/"):
        assert app.http.get(path).status_code == 200
    assert app.http.get("/v1/models", headers=bearer("right")).status_code == 200
    assert app.http.get("/v1/models", headers={"authorization": "bearer right"}).status_code == 200
    assert app.http.post("/flush_cache", headers=bearer("right")).status_code == 200


def test_scripts_of_web_pages_may_call_where_their_origin_is_allowed(make_app: AppFactory) -> None:
    app = make_app("--api-key", "right", "--allowed-origins", "https://chat.example, http://localhost:3000")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    for origin in ("https://chat.example", "http://localhost:3000"):
        asked = app.http.options("/v1/chat/completions", headers={"Origin": origin, **asks})
        assert asked.status_code == 200
        assert "authorization" in asked.headers["access-control-allow-headers"]
        for headers, status in ((bearer("right"), 200), ({}, 401)):
            answer = app.http.get("/v1/models", headers={"Origin": origin, **headers})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin
    asked = app.http.options("/v1/chat/completions", headers={"Origin": "https://other.example", **asks})
    assert asked.status_code == 400
    stranger = app.http.get("/v1/models", headers={"Origin": "https://other.example", **bearer("right")})
    assert "access-control-allow-origin" not in stranger.headers


def test_without_allowed_origins_no_web_page_reads_an_answer(app: App) -> None:
    asks = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert app.http.options("/v1/chat/completions", headers=asks).status_code == 405
    assert "access-control-allow-origin" not in app.http.get("/v1/models", headers=asks).headers


def test_any_origin_may_be_allowed(make_app: AppFactory) -> None:
    app = make_app("--allowed-origins", "*")
    body = {"prompt": "hello", "max_tokens": 4, "stream": True}
    answer = app.http.post("/v1/completions", json=body, headers={"Origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_admin_endpoints_take_only_the_admin_key_where_one_is_set(make_app: AppFactory) -> None:
    app = make_app("--api-key", "user", "--admin-api-key", "boss")
    for path in ("/flush_cache", "/abort_request"):
        check_error(app.http.post(path, json={"rid": "x"}, headers=bearer("user")), 401, None, "invalid_api_key")
        assert app.http.post(path, json={"rid": "x"}, headers=bearer("boss")).status_code == 200
    check_error(app.http.get("/v1/models", headers=bearer("boss")), 401, None)
    only_admin = make_app("--admin-api-key", "boss")
    assert only_admin.http.get("/v1/models").status_code == 200
    check_error(only_admin.http.post("/flush_cache"), 401, None)


def samples(response: httpx.Response) -> dict[str, float]:
    """Sample name, with @ and the value of each label but a histogram's, to value."""
    return {
        "@".join([sample.name, *(value for label, value in sample.labels.items() if label != "le")]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(make_app: AppFactory) -> None:
    app = make_app(fresh=True)
    for _ in range(3):
        app.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 10})
    found = samples(app.http.get("/metrics"))
    for histogram in ("time_to_first_token", "e2e_request_latency"):
        assert found[f"nextn:{histogram}_seconds_count"] == 3
    assert found["nextn:queue_time_seconds_count"] == 3
    assert found["nextn:inter_token_latency_seconds_count"] == 3 * 8
    assert found["nextn:generation_tokens_total"] == 30
    assert found["nextn:num_running_reqs"] == 0
    assert found["nextn:spec_accept_length"] == 2.0
    assert found["nextn:spec_accepted_per_position_total@0"] == found["nextn:spec_num_accepted_tokens_total"] == 15
    for name in ("num_queue_reqs", "token_usage", "cache_hit_rate", "prompt_tokens_total", "num_preemptions_total"):
        assert f"nextn:{name}" in found
    for name in ("num_aborted_requests_total", "spec_num_drafts_total", "spec_num_draft_tokens_total"):
        assert f"nextn:{name}" in found


def test_a_request_that_a_stop_string_ends_has_a_latency_and_is_no_abort(make_app: AppFactory) -> None:
    app = make_app(fresh=True)
    body = {"prompt": "one two three", "max_tokens": 400, "stop": "two"}
    assert app.http.post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == "stop"
    app.wait_until_idle()
    found = samples(app.http.get("/metrics"))
    assert found["nextn:e2e_request_latency_seconds_count"] == 1
    assert found["nextn:num_aborted_requests_total"] == 0


def test_metrics_of_two_servers_are_apart(make_app: AppFactory) -> None:
    busy, idle = make_app(), make_app(fresh=True)
    busy.http.post("/v1/completions", json={"prompt": "x"})
    assert samples(idle.http.get("/metrics"))["nextn:e2e_request_latency_seconds_count"] == 0
