"""What docker/ refers to exists: metrics and labels in a real server's answer, settings, mounted files, each other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nextn.config.server_args import ServerArgs
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import wait_until
from tests.server.processes import launched

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/nextn.json").read_text())

OF_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "job", "instance"}}
"""Series that Prometheus makes itself; of a rule's own labels, those of rules about a server."""

Series = dict[str, set[str]]


@pytest.fixture(scope="module")
def series() -> Series:
    """Name → labels of everything that Prometheus gets from a server that has drafted and checked a request."""
    flags = ("--speculative-num-steps", "3", "--speculative-shadow-rate", "1", "--max-total-tokens", "32768")
    with launched(*flags, module="nextn.launch_server") as server:
        server.wait_ready(60)
        params = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
        answer = server.http.post("/generate", json={"text": "Once upon a time", "sampling_params": params})
        assert answer.status_code == 200

        def scraped() -> Series:
            families = text_string_to_metric_families(server.http.get("/metrics").text)
            found = dict(OF_PROMETHEUS)
            for sample in (sample for family in families for sample in family.samples):
                found[sample.name] = found.get(sample.name, {"job", "instance"}) | set(sample.labels)
            return found

        wait_until(lambda: "nextn:spec_window_acceptance" in scraped())
        return scraped()


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str, str]]:
    """Where a query stands, the query, and the legend made of its labels."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"], ""
    for rule in alerts():
        yield rule["alert"], rule["expr"], ""


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]


def load(name: str) -> Any:
    return yaml.load((DOCKER / name).read_text(), _ComposeLoader)


class _ComposeLoader(yaml.SafeLoader):
    """YAML with the one tag of compose files that is used here."""


_ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def names_in(query: str) -> set[str]:
    """The series that a query reads."""
    without_values = re.sub(r'"[^"]*"', '""', query)
    return set(re.findall(r"\bnextn:\w+|\bup\b|\bALERTS\b", without_values))


def labels_in(query: str) -> set[str]:
    """The labels that a query selects or groups by."""
    matchers = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query)
    groups = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", query)
    listed = re.findall(r"label_values\([^,]*,\s*(\w+)\)", query)
    return {*matchers, *listed, *(label.strip() for group in groups for label in group.split(","))}


def test_every_query_reads_series_and_labels_that_a_server_has(series: Series) -> None:
    for place, query, legend in queries():
        names = names_in(query)
        assert names, f"{place}: {query}: reads nothing"
        assert names <= series.keys(), f"{place}: {sorted(names - series.keys())}: no such series"
        known = set.intersection(*(series[name] for name in names))
        used = labels_in(query) | set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert used <= known, f"{place}: {sorted(used - known)}: no such label of {sorted(names)}"


def test_a_name_or_a_label_that_no_server_has_would_be_seen() -> None:
    query = 'sum by (place, le) (rate(nextn:no_bucket{traffic=~"nextn:x", a!="up"}[5m])) / on (b) up'
    assert names_in(query) == {"nextn:no_bucket", "up"}
    assert labels_in(query) == {"place", "le", "traffic", "a", "b"}


def test_a_legend_names_labels_that_its_query_keeps() -> None:
    for place, query, legend in queries():
        if "sum" in query or "avg by" in query or "max by" in query:
            kept = re.findall(r"\bby \(([^)]*)\)", query)
            for label in re.findall(r"\{\{(\w+)\}\}", legend):
                assert label in kept, f"{place}: {label} is summed away"


def test_counters_are_read_as_rates_and_gauges_as_they_are() -> None:
    since_start = ("Wrong tokens", "Collapses and shadow check", "NextnWrongOutput")
    for place, query, _ in queries():
        if place.startswith(since_start):
            continue
        for name in names_in(query):
            is_counter = name.endswith(("_total", "_bucket", "_count", "_sum"))
            assert (f"rate({name}" in query) == is_counter, f"{place}: {query}"


def test_everything_that_a_server_measures_is_on_the_dashboard(series: Series) -> None:
    shown = {name for _, query, _ in queries() for name in names_in(query)}
    hidden = {name for name in series if not name.endswith(("_created", "_sum", "_count"))} - shown
    assert hidden == set()


def test_panels_say_what_they_show_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    uses = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert uses == {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_alerts_say_how_bad_it_is_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]
    assert {"nextn:spec_draft_sick > 0", "nextn:shadow_disagreements_total > 0"} <= {rule["expr"] for rule in alerts()}


def environment_of_image() -> dict[str, str]:
    """What the ENV instructions of the Dockerfile set."""
    joined = DOCKERFILE.replace("\\\n", " ")
    words = [word for line in joined.splitlines() if line.startswith("ENV ") for word in shlex.split(line)[1:]]
    return dict(word.split("=", 1) for word in words)


def test_every_setting_of_the_image_is_the_servers() -> None:
    environment = environment_of_image()
    ours = {name: value for name, value in environment.items() if name.startswith("NEXTN_")}
    args = ServerArgs.from_cli([], ours)
    assert (args.host, args.port) == ("0.0.0.0", 30000)
    assert f"EXPOSE {args.port}" in DOCKERFILE
    (volume,) = re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    for cache in ("HF_HOME", "TRITON_CACHE_DIR"):
        assert environment[cache].startswith(f"{volume}/")
        assert environment[cache] in re.findall(r"install --directory --owner nextn .*", DOCKERFILE)[0].split()


def test_the_dockerfile_and_compose_name_only_settings_that_exist() -> None:
    texts = [DOCKERFILE, *((DOCKER / name).read_text() for name in ("compose.yaml", "compose.cpu.yaml"))]
    named = set(re.findall(r"NEXTN_\w+", "".join(texts)))
    known = {f"NEXTN_{name.upper()}" for name in ServerArgs.__dataclass_fields__}
    assert "NEXTN_MODEL_PATH" in named
    assert named <= known
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (DOCKER / "alerts.yml").read_text() + json.dumps(DASHBOARD)))
    assert flags <= {"--" + name.replace("_", "-") for name in ServerArgs.__dataclass_fields__}


def test_compose_sets_no_secret_and_passes_on_what_is_set() -> None:
    for entry in load("compose.yaml")["services"]["nextn"]["environment"]:
        assert re.fullmatch(r"HF_TOKEN|NEXTN_[A-Z_]+", entry), entry
    for file in (DOCKER / "Dockerfile", *DOCKER.rglob("[!.]*.*")):
        assert not re.search(r"(?i)(password|token|secret|api_key)\s*[:=]\s*\w", file.read_text()), file


def test_what_compose_mounts_and_builds_from_exists() -> None:
    compose = load("compose.yaml")
    for service in compose["services"].values():
        for mount in service.get("volumes", ()):
            source, target = mount.split(":")[:2]
            assert target.startswith("/")
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
                assert mount.endswith(":ro"), f"{mount}: could be written to"
            else:
                assert source in compose["volumes"], source
    build = compose["services"]["nextn"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    arguments = load("compose.cpu.yaml")["services"]["nextn"]["build"]["args"]
    assert all(re.search(rf"^ARG {name}=", DOCKERFILE, re.MULTILINE) for name in arguments)
    assert f"AS base-{arguments['DEVICE']}" in DOCKERFILE


def test_compose_publishes_to_this_machine_only() -> None:
    ports = [port for service in load("compose.yaml")["services"].values() for port in service["ports"]]
    assert len(ports) == 3
    for port in ports:
        assert port.startswith(("127.0.0.1:", "${API_ADDRESS:-127.0.0.1}:")), port


def test_the_parts_of_the_monitoring_find_each_other() -> None:
    compose, prometheus = load("compose.yaml")["services"], load("prometheus.yml")
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": ["nextn:30000"]}]
    assert 'job="nextn"' in alerts()[0]["expr"]
    assert prometheus["scrape_configs"][0]["job_name"] == "nextn"
    mounted = dict(mount.split(":")[:2] for name in ("prometheus", "grafana") for mount in compose[name]["volumes"])
    assert {f"/etc/prometheus/{name}" for name in prometheus["rule_files"]} <= set(mounted.values())

    (source,) = load("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = load("grafana/provisioning/dashboards/nextn.yml")["providers"]
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    home = Path(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DOCKER / "grafana/dashboards" / home.relative_to(provider["options"]["path"])).is_file()


def test_a_stopped_container_has_the_time_that_the_server_takes_to_end() -> None:
    from nextn.launch_server import ENGINE_EXIT_TIMEOUT

    grace = load("compose.yaml")["services"]["nextn"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > ServerArgs().shutdown_timeout + ENGINE_EXIT_TIMEOUT
    assert re.search(r'^ENTRYPOINT \["python", "-m", "nextn.launch_server"\]$', DOCKERFILE, re.MULTILINE)


def test_the_build_sees_the_package_and_nothing_private() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    copied = {
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
