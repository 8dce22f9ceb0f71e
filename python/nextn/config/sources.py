"""Reading options from flags, environment variables and a YAML file, with errors that name where a value came from."""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nextn.errors import ConfigError

ENV_PREFIX = "NEXTN_"
CONFIG_FLAG = "--config"
LARGEST = 2**63 - 1
"""Of numbers without a bound of their own: no message between processes holds more."""
NOT_NEEDED = {
    "--trust-remote-code": "code of a checkpoint is never run",
    "--disable-shared-experts-fusion": "shared experts are fused only where they are stored as the routed ones",
    "--enable-auto-tool-choice": "tool calls are read wherever a request has tools",
}
"""Flags in the published commands for GLM with other servers that change nothing here → why."""
NAMED_HERE = {
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--max-model-len": "--context-length",
    "--gpu-memory-utilization": "--mem-fraction-static",
    "--max-num-seqs": "--max-running-requests",
    "--max-num-batched-tokens": "--chunked-prefill-size",
    "--no-enable-prefix-caching": "--disable-radix-cache",
    "--enforce-eager": "--disable-cuda-graph",
}
"""Flags of other servers → the one that means the same, where its name does not look like it."""
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


@dataclass(frozen=True)
class Option:
    """One setting. least, most: bounds of a number, both included."""

    group: str
    help: str
    choices: tuple[str, ...] | None
    least: float | None
    most: float | None
    kind: type

    def parse(self, value: Any, place: str) -> Any:
        """Check a value from any source; text is converted.

        place: the flag, variable or key, for the message
        Raises ConfigError.
        """
        if self.choices is not None:
            if value is False and "off" in self.choices:
                value = "off"  # as YAML reads an unquoted off
            for choice in self.choices:
                if str(value).lower() == choice.lower():
                    return choice
            raise ConfigError(f"{place}: found {value!r}, expected one of {', '.join(self.choices)}")
        if self.kind is bool:
            if str(value).lower() not in _BOOLEANS:
                raise ConfigError(f"{place}: found {value!r}, expected true or false")
            return _BOOLEANS[str(value).lower()]
        if self.kind is str:
            return _text(value, place)
        return self._number(value, place)

    def _number(self, value: Any, place: str) -> int | float:
        wanted = "a whole number" if self.kind is int else "a number"
        least = -LARGEST if self.least is None else self.least
        most = LARGEST if self.most is None else self.most
        bounds = [f"at least {least:g}"] if self.least is not None else []
        bounds += [f"at most {most:g}"] if self.most is not None else ["below 2^63"]
        try:
            number: int | float = self.kind(str(value))
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise ConfigError(f"{place}: found {value!r:.100}, expected {wanted} {' and '.join(bounds)}")
        return number


def _text(value: Any, place: str) -> str:
    """A string; from YAML also what looks like a number, but nothing whose text YAML has changed."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{place}: found {value!r}, expected text; put it in quotes")
    if value == "":
        raise ConfigError(f"{place}: found nothing, expected text; leave it out to have the default")
    return str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; --help lists all flags")


def read_sources(
    program: str, options: Mapping[str, tuple[Option, Any]], argv: Sequence[str], environ: Mapping[str, str]
) -> dict[str, Any]:
    """The values that any source gives, by field name; a flag beats a variable beats the YAML file.

    options: field name → option and default
    Raises ConfigError for unknown names and for values that are not allowed.
    """
    parser = _make_parser(program, options)
    given = vars(parser.parse_args(_known_flags(argv, options)))
    config_file = given.pop("config", None) or environ.get(f"{ENV_PREFIX}CONFIG")
    values = _from_yaml(config_file, options) if config_file else {}
    values |= _from_environment(environ, options)
    for name, value in given.items():
        values[name] = options[name][0].parse(value, flag_of(name))
    return values


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _make_parser(program: str, options: Mapping[str, tuple[Option, Any]]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--FLAG VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=110),
        epilog=f"Every flag is also an environment variable ({ENV_PREFIX}PORT=30000) and a key of the YAML file (port: "
        "30000). A flag beats a variable, a variable beats the file.",
    )
    parser.add_argument(CONFIG_FLAG, metavar="FILE", help="YAML file with any of these settings")
    groups = {option.group: parser.add_argument_group(option.group) for option, _ in options.values()}
    for name, (option, default) in options.items():
        group = groups[option.group]
        if option.kind is bool:
            text = f"{option.help} (default: {str(default).lower()})"
            group.add_argument(flag_of(name), dest=name, action=argparse.BooleanOptionalAction, help=text)
            continue
        shown = "" if default is None else f" (default: {default})"
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.kind.__name__.upper()
        group.add_argument(flag_of(name), dest=name, metavar=metavar, help=(option.help + shown).replace("%", "%%"))
    return parser


def _known_flags(argv: Sequence[str], options: Mapping[str, tuple[Option, Any]]) -> list[str]:
    """argv as it is; an unknown flag is named with why it is not needed or with the flags that look like it."""
    switches = [name for name, (option, _) in options.items() if option.kind is bool]
    known = [flag_of(name) for name in options] + [flag_of(f"no_{name}") for name in switches]
    known += [CONFIG_FLAG, "--help"]
    for word in argv:
        flag = word.split("=", 1)[0]
        if flag in NOT_NEEDED:
            raise ConfigError(f"{flag}: is not needed here, for {NOT_NEEDED[flag]}; leave it out")
        if flag in NAMED_HERE:
            raise ConfigError(f"{flag}: there is no such flag; did you mean {NAMED_HERE[flag]}?")
        if flag.startswith("--") and flag not in known:
            raise ConfigError(f"{flag}: there is no such flag{_near(flag, known)}")
    return list(argv)


def _from_yaml(file: str, options: Mapping[str, tuple[Option, Any]]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date or number that is none
        raise ConfigError(f"{CONFIG_FLAG} {file}: cannot be read: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{CONFIG_FLAG} {file}: found {type(loaded).__name__}, expected keys and values")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise ConfigError(f"{file}: {key}: there is no such setting{_near(name, options)}")
        if name in values:
            raise ConfigError(f"{file}: {key}: stands there twice, with - and with _; leave one out")
        if value is not None:
            values[name] = options[name][0].parse(value, f"{file}: {key}")
    return values


def _from_environment(environ: Mapping[str, str], options: Mapping[str, tuple[Option, Any]]) -> dict[str, Any]:
    """An empty variable counts as not set: that is how compose files pass on what nobody has set."""
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == f"{ENV_PREFIX}CONFIG" or not value:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in options:
            known = [ENV_PREFIX + known.upper() for known in options]
            raise ConfigError(f"{variable}: there is no such setting{_near(variable, known)}")
        values[name] = options[name][0].parse(value, variable)
    return values


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""
