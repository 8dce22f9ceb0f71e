"""The package imports nothing but what its installation brings."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nextn

PACKAGE = Path(nextn.__file__).parent
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
WITH_TORCH = {"triton"}
"""Not declared: it comes with torch's CUDA build, and nextn serves without it."""


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    declared = {_normalized(re.split(r"[^\w.-]", line)[0]) for line in project["dependencies"]}
    assert {"torch", "huggingface-hub"} <= declared
    makers = packages_distributions()
    imported = {name: file for file in PACKAGE.rglob("*.py") for name in _imports(file)}
    assert {"torch", "yaml"} <= imported.keys()
    strangers = {
        f"{name} (in {file.relative_to(PACKAGE)})"
        for name, file in imported.items()
        if name not in sys.stdlib_module_names | WITH_TORCH | {"nextn"}
        and declared.isdisjoint(map(_normalized, makers.get(name, [])))
    }
    assert not strangers


def _imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {module.partition(".")[0] for module in modules}


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
