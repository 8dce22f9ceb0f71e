"""The README names nothing that does not exist, and leaves no folder or endpoint out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nextn
from nextn.bench.options import parse_options
from nextn.config.server_args import ServerArgs

ROOT = Path(__file__).parents[1]
PACKAGE = Path(nextn.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

LINES = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()


def commands(module: str) -> list[list[str]]:
    """The arguments of every command line that starts a module."""
    found = [line.split(f"python -m {module}", 1)[1] for line in LINES if f"python -m {module}" in line]
    return [shlex.split(arguments, comments=True) for arguments in found]


def test_the_commands_are_understood() -> None:
    servers = commands("nextn.launch_server")
    assert [ServerArgs.from_cli(argv, {}).tp_size for argv in servers] == [1, 8]
    (load,) = commands("nextn.bench_serving")
    assert parse_options(load).num_prompts == 64
    (image,) = [line.split(" nextn ", 1)[1] for line in LINES if line.startswith("docker run")]
    assert ServerArgs.from_cli(shlex.split(image), {}).tp_size == 8
    (compose,) = [line.split("docker", 1)[0] for line in LINES if "docker compose" in line]
    assert ServerArgs.from_cli([], dict(setting.split("=") for setting in compose.split())).tp_size == 8
    for module in re.findall(r"python -m ([\w.]+)", README):
        path = Path(*module.split("."))
        places = [ROOT / path, ROOT / "python" / path]
        assert any(place.with_suffix(".py").is_file() or (place / "__main__.py").is_file() for place in places), module


def test_the_servers_flags_exist() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"`(--[a-z][a-z-]+)", text))
    others = {"--config", "--help", "--deep", "--json", "--plot"}
    assert "--tp-size" in named
    assert named - others <= {"--" + name.replace("_", "-") for name in ServerArgs.__dataclass_fields__}


def test_paths_and_links_lead_somewhere() -> None:
    paths = [path for path in re.findall(r"`([a-z_]+/[\w./]*)`", README) if not path.endswith(".env")]
    assert "speculative/cycle.py" in paths
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("#")]
    assert "LICENSE" in links
    assert not [path for path in [*paths, *links] if not (ROOT / path).exists() and not (PACKAGE / path).exists()]
    headings = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_every_folder_of_the_package_is_in_the_table() -> None:
    rows = "".join(re.findall(r"^\| (`\w+/`.*?) \|", README, re.MULTILINE))
    assert set(re.findall(r"`(\w+)/`", rows)) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_every_endpoint_is_named() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "server").glob("*.py"))
    routes = set(re.findall(r"@\w+\.(?:get|post|api_route)\(\"(/\w[\w/]*)\"", sources))
    assert "/get_server_info" in routes
    assert {route for route in routes if f"`{route}`" not in README} == set()
