"""Flags, variables and the YAML file: precedence, and errors that name their place."""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextn.config.engine_config import EngineConfig
from nextn.config.server_args import ServerArgs
from nextn.config.sources import NAMED_HERE, NOT_NEEDED, flag_of
from nextn.errors import ConfigError


def from_cli(*argv: str, **environ: str) -> ServerArgs:
    return ServerArgs.from_cli(argv, environ)


def from_yaml(folder: Path, text: str, *argv: str, **environ: str) -> ServerArgs:
    file = folder / "server.yaml"
    file.write_text(text, encoding="utf-8")
    return from_cli("--config", str(file), *argv, **environ)


def test_without_anything_the_defaults_hold() -> None:
    args = from_cli()
    assert args == ServerArgs()
    assert (args.host, args.port, args.model_path, args.enable_metrics) == ("127.0.0.1", 30000, None, True)


def test_a_flag_beats_a_variable_and_a_variable_beats_the_file(tmp_path: Path) -> None:
    text = "port: 1\npage-size: 1\nmax_queued_requests: 1\nhost: yaml"
    args = from_yaml(tmp_path, text, "--port", "3", NEXTN_PORT="2", NEXTN_PAGE_SIZE="2")
    assert (args.port, args.page_size, args.max_queued_requests, args.host) == (3, 2, 1, "yaml")


@settings(deadline=None)  # it writes files
@given(
    flag=st.none() | st.integers(1, 99), variable=st.none() | st.integers(1, 99), entry=st.none() | st.integers(1, 99)
)
def test_the_first_source_that_says_something_wins(
    tmp_path_factory: pytest.TempPathFactory, flag: int | None, variable: int | None, entry: int | None
) -> None:
    text = "{}" if entry is None else f"max-choices: {entry}"
    argv = [] if flag is None else ["--max-choices", str(flag)]
    environ = {} if variable is None else {"NEXTN_MAX_CHOICES": str(variable)}
    expected = next((value for value in (flag, variable, entry) if value is not None), 64)
    assert from_yaml(tmp_path_factory.getbasetemp(), text, *argv, **environ).max_choices == expected


def test_a_switch_can_be_turned_off_again(tmp_path: Path) -> None:
    assert from_cli("--disable-radix-cache").disable_radix_cache
    assert from_cli(NEXTN_DISABLE_RADIX_CACHE="1").disable_radix_cache
    assert from_yaml(tmp_path, "disable_radix_cache: true").disable_radix_cache
    assert not from_yaml(tmp_path, "disable_radix_cache: true", "--no-disable-radix-cache").disable_radix_cache
    assert not from_cli("--no-enable-metrics").enable_metrics
    assert from_cli("--enable-metrics", NEXTN_ENABLE_METRICS="off").enable_metrics


def test_the_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("port: 7")
    assert from_cli(NEXTN_CONFIG=str(tmp_path / "a.yaml")).port == 7


def test_an_empty_variable_is_not_set_and_other_variables_are_not_ours() -> None:
    assert from_cli(NEXTN_API_KEY="", NEXTN_PORT="", PORT="7", NEXTNX="7") == ServerArgs()


def test_choices_are_taken_in_any_case() -> None:
    assert from_cli("--speculative-algorithm", "nextn").speculative_algorithm == "NEXTN"
    assert from_cli("--speculative-algorithm", "NONE").speculative_algorithm == "none"
    assert ServerArgs(log_level="INFO").log_level == "info"


def test_a_number_may_name_a_model_in_the_file(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "served-model-name: 45").served_model_name == "45"
    assert from_yaml(tmp_path, "api-key: null").api_key is None


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--port", "70000"], "--port: found '70000', expected a whole number at least 0 and at most 65535"),
        (["--port", "x"], "--port: found 'x', expected a whole number"),
        (["--random-seed", "9" * 20], "--random-seed: found '9{20}', expected a whole number at least 0 and below 2"),
        (["--random-seed", "9" * 400], "--random-seed: found '9{99}, expected a whole number"),
        (["--page-size", "0"], "--page-size: found '0', expected a whole number at least 1"),
        (["--context-length", "0"], "--context-length: found '0'"),
        (["--startup-timeout", "nan"], "--startup-timeout: found 'nan', expected a number at least 1"),
        (["--startup-timeout", "inf"], "--startup-timeout: found 'inf'"),
        (["--dtype", "float64"], "--dtype: found 'float64', expected one of auto, float32, bfloat16, float16"),
        (["--quantization", "awq"], "--quantization: found 'awq', expected one of compressed-tensors, fp8"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser: found 'hermes', expected one of glm45, glm47"),
        (["--chunked-prefill-size", "0"], "--chunked-prefill-size: found 0, expected at least 1, or -1"),
        (["--chunked-prefill-size", "-2"], "--chunked-prefill-size: found '-2'"),
        (["--speculative-num-steps", "6"], "--speculative-num-steps: found '6', expected .* at most 5"),
        (["--speculative-eagle-topk", "2"], "--speculative-eagle-topk: found 2, expected 1: .* chain"),
        (["--speculative-num-draft-tokens", "7"], "--speculative-num-draft-tokens: found '7', expected .* at most 6"),
        (
            ["--speculative-num-steps", "1", "--speculative-num-draft-tokens", "4"],
            "--speculative-num-draft-tokens: found 4, expected 2",
        ),
        (
            ["--speculative-algorithm", "none", "--speculative-num-steps", "3"],
            "together with --speculative-algorithm none",
        ),
        (
            ["--speculative-algorithm", "none", "--speculative-draft-model-path", "d"],
            "--speculative-draft-model-path: found d together with --speculative-algorithm none",
        ),
        (
            ["--speculative-algorithm", "none", "--speculative-num-draft-tokens", "4"],
            "--speculative-num-draft-tokens: found 4 together with --speculative-algorithm none",
        ),
        (
            ["--speculative-algorithm", "none", "--speculative-canary", "fail"],
            "--speculative-canary: found fail together with --speculative-algorithm none",
        ),
        (
            ["--speculative-algorithm", "none", "--speculative-draft-head", "fp8"],
            "--speculative-draft-head: found fp8 together with --speculative-algorithm none",
        ),
        (
            ["--speculative-algorithm", "none", "--speculative-draft-model-quantization", "unquant"],
            "--speculative-draft-model-quantization: found unquant together with --speculative-algorithm none",
        ),
        (["--max-total-tokens", "31"], "--max-total-tokens: found 31, expected at least two pages .*32"),
        (["--api-key", ""], "--api-key: found nothing, expected text"),
        (["--model-path="], "--model-path: found nothing, expected text"),
        (["--skip-tokenizer-init", "--reasoning-parser", "glm45"], "--skip-tokenizer-init: leaves no text"),
        (["--prot", "1"], "--prot: there is no such flag; did you mean --port"),
        (["--model", "x"], "--model: there is no such flag; did you mean --model-path"),
        (["--tp", "8"], "--tp: there is no such flag; did you mean .*--tp-size"),
        (["--tensor-parallel-size", "8"], "--tensor-parallel-size: there is no such flag; did you mean --tp-size"),
        (["--max-model-len=4096"], "--max-model-len: there is no such flag; did you mean --context-length"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice: is not needed here, .*; leave it out"),
        (["--trust-remote-code"], "--trust-remote-code: is not needed here, .*; leave it out"),
        (["--disable-shared-experts-fusion"], "--disable-shared-experts-fusion: is not needed here, .*; leave it out"),
        (["--attention-backend", "triton"], "--attention-backend: there is no such flag"),
        (["--no-port"], "--no-port: there is no such flag"),
        (["--port"], "--port: expected one argument"),
        (["a-model"], "unrecognized arguments: a-model"),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(argv: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_cli(*argv)


def test_what_other_servers_call_a_flag_leads_to_one_that_exists() -> None:
    flags = {flag_of(field.name) for field in fields(ServerArgs)}
    assert set(NAMED_HERE.values()) <= flags
    assert not flags & {*NAMED_HERE, *NOT_NEEDED}


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("NEXTN_PORT", "x", "NEXTN_PORT: found 'x', expected a whole number"),
        ("NEXTN_ENABLE_METRICS", "maybe", "NEXTN_ENABLE_METRICS: found 'maybe', expected true or false"),
        ("NEXTN_PROT", "1", "NEXTN_PROT: there is no such setting; did you mean NEXTN_PORT"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_cli(**{variable: value})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot: 1", r"server\.yaml: prot: there is no such setting; did you mean port"),
        ("port: many", r"server\.yaml: port: found 'many', expected a whole number"),
        ("host: 2020-13-45", r"--config .*server\.yaml: cannot be read: month must be in 1\.\.12"),
        ("port: " + "1" * 5000, r"--config .*server\.yaml: cannot be read: Exceeds the limit"),
        ("port: " + "[" * 5000, r"--config .*server\.yaml: cannot be read: maximum recursion"),
        (
            "port: [1,",
            r"--config .*server\.yaml: cannot be read: while parsing a flow node [^\n]* line 1, column 10: [^\n]*$",
        ),
        ("port: true", r"server\.yaml: port: found True"),
        ("port: [1]", r"server\.yaml: port: found \[1\]"),
        ("page-size: 1\npage_size: 2", r"server\.yaml: page_size: stands there twice"),
        ("api-key: yes", r"server\.yaml: api-key: found True, expected text; put it in quotes"),
        ("host: [a]", r"server\.yaml: host: found \['a'\], expected text"),
        ("- port", "found list, expected keys and values"),
        ("port", "found str, expected keys and values"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_entry_of_the_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_yaml(tmp_path, text)


def test_a_file_of_comments_sets_nothing(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "# port: 1\n") == ServerArgs()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml: cannot be read"):
        from_cli("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"dtype": "float64"}, "--dtype: found 'float64'"),
        ({"page_size": 0}, "--page-size: found 0"),
        ({"page_size": 1.5}, "--page-size: found 1.5"),
        ({"page_size": None}, "--page-size: found None"),
        ({"model_path": 3j}, "--model-path: found 3j"),
    ],
)
def test_arguments_made_in_python_are_checked_too(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ServerArgs(**values)


def test_a_path_object_names_a_model() -> None:
    values: dict[str, Any] = {"model_path": Path("a") / "b"}
    assert ServerArgs(**values).model_path == "a/b"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--speculative-algorithm", "none"], 0),
        (["--speculative-algorithm", "NEXTN"], 3),
        (["--speculative-algorithm", "eagle", "--speculative-num-steps", "2"], 2),
        (["--speculative-num-steps", "0"], 0),
        (["--speculative-num-draft-tokens", "4"], 3),
        (
            [
                "--speculative-algorithm",
                "EAGLE",
                "--speculative-num-steps",
                "3",
                "--speculative-eagle-topk",
                "1",
                "--speculative-num-draft-tokens",
                "4",
            ],
            3,
        ),
    ],
)
def test_speculation_flags_become_a_number_of_drafts(argv: list[str], expected: int | None) -> None:
    assert from_cli(*argv).engine_config("m").num_draft_steps == expected


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("unset", None), ("unquant", "unquant"), ("fp8", "fp8")])
def test_the_override_of_the_drafts_quantization_keeps_its_three_states(
    given: str | None, expected: str | None
) -> None:
    argv = [] if given is None else ["--speculative-draft-model-quantization", given]
    assert from_cli(*argv).engine_config("m").draft_quantization == expected


@pytest.mark.parametrize("head", ["auto", "fp8", "stored"])
def test_the_engine_gets_what_drafts_read_of_the_head(head: str) -> None:
    assert from_cli("--speculative-draft-head", head).engine_config("m").draft_head == head


def test_the_engine_gets_what_concerns_it() -> None:
    args = from_cli(
        *[
            "--dtype",
            "bfloat16",
            "--context-length",
            "99",
            "--max-running-requests",
            "3",
            "--max-queued-requests",
            "4",
            "--max-total-tokens",
            "640",
            "--chunked-prefill-size",
            "-1",
            "--schedule-policy",
            "priority",
            "--page-size",
            "8",
            "--disable-radix-cache",
            "--random-seed",
            "5",
            "--quantization",
            "fp8",
            "--load-format",
            "dummy",
            "--speculative-draft-model-path",
            "d",
        ]
    )
    assert args.engine_config("m") == EngineConfig(
        model_path="m",
        draft_model_path="d",
        load_format="dummy",
        dtype="bfloat16",
        quantization="fp8",
        context_length=99,
        max_running_requests=3,
        max_queued_requests=4,
        max_total_tokens=640,
        chunked_prefill_size=-1,
        schedule_policy="priority",
        page_size=8,
        enable_prefix_cache=False,
        random_seed=5,
    )


def test_defaults_of_server_and_engine_agree() -> None:
    assert ServerArgs().engine_config("m") == EngineConfig(model_path="m")


def test_keys_are_hidden_where_arguments_are_shown() -> None:
    shown = from_cli("--api-key", "secret", "--port", "7").redacted()
    assert "secret" not in str(shown)
    assert "secret" not in repr(ServerArgs(api_key="secret", admin_api_key="secret2"))
    assert (shown["api_key"], shown["admin_api_key"], shown["port"]) == ("***", None, 7)
    assert shown.keys() == ServerArgs.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", [f.name for f in fields(ServerArgs) if not f.repr])
def test_what_the_repr_leaves_out_is_also_hidden(name: str) -> None:
    values: dict[str, Any] = {name: "secret"}
    assert ServerArgs(**values).redacted()[name] == "***"


OTHER: dict[str, Any] = {
    "chunked_prefill_size": 128,
    "speculative_num_steps": 2,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
    "speculative_shadow_rate": 0.5,
    "max_total_tokens": 640,
    "mem_fraction_static": 0.5,
    "stream_interval": 2,
    "port": 7,
    "dist_init_addr": "first:7",
}
"""Values that are allowed and not the default, where one cannot be made up from the option alone."""

BESIDE: dict[str, dict[str, Any]] = {
    "nnodes": {"tp_size": 2, "dist_init_addr": "first:7"},
    "node_rank": {"tp_size": 2, "nnodes": 2, "dist_init_addr": "first:7"},
}
"""Fields that a field does not go without."""


@pytest.mark.parametrize("field", fields(ServerArgs), ids=lambda field: field.name)
def test_every_field_is_a_flag_a_variable_and_a_key(field: Field[Any], tmp_path: Path) -> None:
    name, option = field.name, field.metadata["option"]
    made_up = {bool: not field.default, str: f"a {name}", int: option.least, float: 77.5}[option.kind]
    value = OTHER.get(name, option.choices[-1] if option.choices else made_up)
    if value == field.default:
        value += 1
    text = str(value).lower() if option.kind is bool else str(value)
    switch = flag_of(name if value is True else f"no_{name}")
    beside = BESIDE.get(name, {})
    environ = {f"NEXTN_{other.upper()}": str(of_other) for other, of_other in beside.items()}
    expected = ServerArgs(**{name: value, **beside})
    assert getattr(expected, name) == value != field.default
    assert from_cli(*([switch] if option.kind is bool else [flag_of(name), text]), **environ) == expected
    assert from_cli(**{f"NEXTN_{name.upper()}": text}, **environ) == expected
    assert from_yaml(tmp_path, f"{name}: {text}", **environ) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tp-size 3 --nnodes 2 --dist-init-addr a:1", "--tp-size: found 3, expected a multiple of --nnodes 2"),
        ("--tp-size 2 --nnodes 2 --node-rank 2 --dist-init-addr a:1", "--node-rank: found 2, expected less than"),
        ("--node-rank 1", "--node-rank: found 1, expected less than --nnodes 1"),
        ("--tp-size 2 --nnodes 2", "--dist-init-addr: found nothing, expected HOST:PORT of node 0"),
        ("--dist-init-addr a", "--dist-init-addr: found 'a', expected HOST:PORT"),
        ("--dist-init-addr :1", "--dist-init-addr: found ':1', expected HOST:PORT"),
        ("--dist-init-addr a:0", "--dist-init-addr: found 'a:0', expected HOST:PORT"),
        ("--dist-init-addr a:66666", "--dist-init-addr: found 'a:66666', expected HOST:PORT"),
        ("--tp-size 0", "--tp-size: found '0', expected a whole number at least 1"),
    ],
)
def test_nodes_that_do_not_fit_together_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_cli(*flags.split())
    assert str(refusal.value).startswith(message)


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        from_cli("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ServerArgs.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "(default: 30000)" in text
    for group in {field.metadata["option"].group for field in fields(ServerArgs)}:
        assert f"\n{group}:\n" in text
