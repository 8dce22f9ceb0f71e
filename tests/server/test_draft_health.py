"""What the server says about the draft: /health detail, /metrics, /get_server_info, and the exit code of a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import torch
from nextn.demo import checkpoint_dir
from nextn.protocol.draft_health import Acceptance, CanaryResult, DraftHealth, DraftState, ShadowCounts
from safetensors.torch import load_file, save_file

from tests.server.conftest import AppFactory, wait_until
from tests.server.fake_engine import Behaviour
from tests.server.processes import launched
from tests.server.test_admin import samples

SMALL = ("--max-total-tokens", "32768")


def health(state: DraftState, complaint: str | None, verdict: str = "healthy", num_collapses: int = 0) -> DraftHealth:
    window = Acceptance(num_chains=10, drafted_per_position=[10, 10, 5], accepted_per_position=[8, 5, 2])
    return DraftHealth(
        state=state,
        complaint=complaint,
        num_collapses=num_collapses,
        windows={"all": window, "cached": window},
        canary=CanaryResult(verdict=verdict, message="canary: …", seconds=0.1),  # type: ignore[arg-type]
    )


def test_health_is_ok_and_brief_while_the_draft_is_well(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(draft_health=health("healthy", None)), fresh=True)
    wait_until(lambda: app.services.engine.draft_health is not None)
    assert app.http.get("/health").json() == {"status": "ok"}


def test_a_collapse_degrades_healths_detail_and_not_its_status(make_app: AppFactory) -> None:
    told = health("collapsed", "collapsed: the first draft was accepted in 2%", num_collapses=1)
    app = make_app(behaviour=Behaviour(draft_health=told), fresh=True)
    wait_until(lambda: app.services.engine.draft_health is not None)
    response = app.http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "draft": "collapsed: the first draft was accepted in 2%"}
    found = samples(app.http.get("/metrics"))
    assert found["nextn:spec_draft_sick@collapsed"] == 1
    assert found["nextn:spec_draft_sick@never_healthy"] == found["nextn:spec_draft_sick@canary"] == 0
    assert found["nextn:spec_draft_collapses_total"] == 1


def test_metrics_have_the_window_by_traffic_and_position(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(draft_health=health("unknown", "canary: sick", "sick")), fresh=True)
    wait_until(lambda: app.services.engine.draft_health is not None)
    assert app.http.get("/health").json()["draft"] == "canary: sick"
    found = samples(app.http.get("/metrics"))
    assert found["nextn:spec_draft_sick@canary"] == 1
    for traffic in ("all", "cached"):
        assert found[f"nextn:spec_window_accept_length@{traffic}"] == 2.5
        rates = [found[f"nextn:spec_window_acceptance@{position}@{traffic}"] for position in range(3)]
        assert rates == [0.8, 0.5, 0.4]


def test_without_a_draft_there_are_no_metrics_of_its_health(make_app: AppFactory) -> None:
    app = make_app(behaviour=Behaviour(draft_health=health("off", None)), fresh=True)
    wait_until(lambda: app.services.engine.draft_health is not None)
    assert "spec_draft_sick" not in app.http.get("/metrics").text


def test_what_the_shadow_check_found_is_a_metric(make_app: AppFactory) -> None:
    counts = ShadowCounts(num_requests=5, num_tokens=70, num_disagreements=2, num_skipped=1)
    told = msgspec.structs.replace(health("healthy", counts.complaint), shadow=counts)
    app = make_app(behaviour=Behaviour(draft_health=told), fresh=True)
    wait_until(lambda: app.services.engine.draft_health is not None)
    found = samples(app.http.get("/metrics"))
    names = ("requests", "tokens", "disagreements", "skipped")
    assert [found[f"nextn:shadow_{name}_total"] for name in names] == [5, 70, 2, 1]
    assert app.http.get("/health").json()["draft"].startswith("wrong output: 2 of 70 tokens")


def test_finished_requests_are_checked_while_the_server_is_idle() -> None:
    with launched("--speculative-shadow-rate", "1", *SMALL, module="nextn.launch_server") as server:
        server.wait_ready()
        params = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
        assert server.http.post("/generate", json={"text": "Hello!", "sampling_params": params}).status_code == 200
        wait_until(lambda: samples(server.http.get("/metrics")).get("nextn:shadow_tokens_total") == 30)
        told = server.http.get("/get_server_info").json()["engine"]["draft_health"]["shadow"]
        assert told == {"num_requests": 1, "num_tokens": 30, "num_disagreements": 0, "num_skipped": 0}
        assert server.http.get("/health").json() == {"status": "ok"}


def test_a_sick_draft_is_refused_or_served_with_a_warning(tmp_path: Path) -> None:
    """The real server on the embedded checkpoint whose draft reads the halves of its input the wrong way round."""
    folder = tmp_path / "swapped"
    shutil.copytree(checkpoint_dir(), folder)
    state = load_file(folder / "mtp.safetensors")
    (name,) = [name for name in state if name.endswith("eh_proj.weight")]
    state[name] = torch.roll(state[name], state[name].shape[1] // 2, 1)
    save_file(state, folder / "mtp.safetensors")

    flags = ("--model-path", str(folder), *SMALL)
    with launched(*flags, "--speculative-canary", "fail", module="nextn.launch_server") as server:
        assert server.wait() == 1
        assert server.err[-1].startswith("nextn: error: canary: the draft is sick: position 1 accepted")
        assert "Traceback" not in "".join(server.err)
    with launched(*flags, module="nextn.launch_server") as server:
        server.wait_ready()
        assert sum("ERROR" in line and "the draft is sick" in line for line in server.err) == 1
        wait_until(lambda: "draft" in server.http.get("/health").json())
        assert server.http.get("/health").status_code == 200
        told = server.http.get("/get_server_info").json()["engine"]["draft_health"]
        assert told["canary"]["verdict"] == "sick"
        assert "halves of eh_proj's input swapped" in told["complaint"]
        assert samples(server.http.get("/metrics"))["nextn:spec_draft_sick@canary"] == 1
