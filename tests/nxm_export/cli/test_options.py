"""Options of the command line and the settings that they stand for: every one is there, with the setting's own
default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from engines.benchmark import fastest_backend
from engines.serving.settings import ConnectionLimits, ModelOptions, RequestLimits, ServerOptions, TritonOptions
from nxm_export.cli import main
from nxm_export.cli.options import numbers_of, settings_of, shape_of
from nxm_export.contract.options import options_of
from nxm_export.contract.plan import WeightSpec
from nxm_export.errors import PlanError
from nxm_export.progress import silent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Settings that are for callers in Python alone. A new field is an option, or stands here.
PYTHON_ONLY = {
    Settings: {
        *("dense_freeze_embeddings", "admm_share", "dual_updates", "damping", "strength", "residual_gate"),
        *("sr_ste_share", "sr_ste_decay", "losses", "calibration_samples", "percentile"),
    },
    SearchSettings: {"batch_size", "latencies", "latency_source"},
    ModelOptions: {"lengths", "expect_sha256"},  # which --buckets and --expect-sha256 give as texts
    ServerOptions: {"requests", "connections"},
    RequestLimits: set(),
    ConnectionLimits: {"head"},
    TritonOptions: {"image", "expect_sha256"},  # which --image and --expect-sha256 give
}
COMMANDS = [
    ("run", Settings),
    ("compress", Settings),
    ("search", SearchSettings),
    ("serve", ModelOptions),
    ("serve", ServerOptions),
    ("serve", RequestLimits),
    ("serve", ConnectionLimits),
    ("triton", TritonOptions),
]
# What a command cannot do without.
REQUIRED = {
    "run": [],
    "compress": ["model", "--out", "o"],
    "search": ["model", "--train", "t", "--out", "o"],
    "serve": ["engine"],
    "triton": ["engine", "--out", "o"],
}


@pytest.mark.parametrize("kind", PYTHON_ONLY)
def test_a_field_of_the_settings_is_an_option_or_said_to_be_none(kind: type[DataclassInstance]) -> None:
    options = {name for name, _ in options_of(kind)}
    assert options.isdisjoint(PYTHON_ONLY[kind])
    assert options | PYTHON_ONLY[kind] == {entry.name for entry in fields(kind)}


@pytest.mark.parametrize(("command", "kind"), COMMANDS)
def test_every_option_of_the_settings_is_on_the_command_line(command: str, kind: type[DataclassInstance]) -> None:
    parameters = {str(parameter.name): parameter for parameter in main.commands[command].params}
    for name, option in options_of(kind):
        flag = option.flag or f"--{name.replace('_', '-')}"
        assert flag in parameters[name].opts
        assert getattr(parameters[name], "help", None) == option.help or command == "search"


@pytest.mark.parametrize(("command", "kind"), COMMANDS)
def test_a_command_without_options_has_the_settings_of_a_caller_without_arguments(
    command: str, kind: type[DataclassInstance]
) -> None:
    context = main.commands[command].make_context(command, list(REQUIRED[command]))
    assert settings_of(kind, context.params) == kind()


def test_options_reach_their_settings() -> None:
    given = [
        "m",
        "--out",
        "o",
        "--train-embeddings",
        "--no-distill",
        "--output-limit",
        "inf",
        "--augment",
        "0",
        "--steps",
        "7",
    ]
    context = main.commands["compress"].make_context("compress", given)
    settings = settings_of(Settings, context.params, seed=3)
    assert settings == Settings(freeze_embeddings=False, distill=False, output_limit=None, augment=0.0, steps=7, seed=3)
    given = ["m", "--train", "t", "--out", "o", "--candidates", "W8, dense", "--halving", "4,8", "--pareto", "0.5"]
    context = main.commands["search"].make_context("search", given)
    assert settings_of(SearchSettings, context.params) == SearchSettings(
        candidate_specs=("W8", "dense"), halving=(4, 8), pareto=(0.5,)
    )


@pytest.mark.parametrize(
    "given",
    [
        ["--pattern", "2:4"],  # the default, and asked for all the same
        ["--weight-bits", "4"],
        ["--placement", "attention"],
        ["--residual", "int8"],
        ["--embedding", "int8"],
        ["--keep-dense", "*"],
    ],
    ids=" ".join,
)
def test_a_plan_is_given_alone(given: list[str]) -> None:
    """It would win silently; the plan's file is not even looked for."""
    arguments = ["compress", "m", "--train", "t", "--dev", "d", "--out", "o", "--plan", "none.json"]
    result = CliRunner().invoke(main, [*arguments, *given])
    assert result.exit_code == 1
    assert f"a plan says itself what every weight gets, so {given[0]} would be dropped" in result.stderr
    alone = CliRunner().invoke(main, arguments)
    assert "would be dropped" not in alone.stderr
    assert alone.exit_code == 1


def test_an_option_in_another_unit_reaches_its_setting_in_the_setting_s_unit() -> None:
    given = ["engine", "--timeout-ms", "1500", "--max-body-mb", "0.5", "--max-delay-ms", "2", "--read-timeout-ms", "1"]
    values = main.commands["serve"].make_context("serve", given).params
    assert settings_of(RequestLimits, values) == RequestLimits(max_body=512 * 1024, timeout=1.5)
    assert settings_of(ModelOptions, values) == ModelOptions(max_delay=0.002)
    assert settings_of(ConnectionLimits, values) == ConnectionLimits(read_timeout=0.001)
    assert type(settings_of(RequestLimits, values).max_body) is int


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--timeout-ms", "0.9"), ("--max-body-mb", "0.0009"), ("--port", "65536"), ("--parity", "maybe")],
)
def test_the_ranges_of_serving_are_in_the_unit_of_the_option(flag: str, value: str) -> None:
    with pytest.raises(click.BadParameter):
        main.commands["serve"].make_context("serve", ["engine", flag, value])


class _Called(Exception):
    """The function behind a command was called, and need not run."""


def _arguments_of(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., object], command: Sequence[str]
) -> dict[str, object]:
    """What a command calls `function` with: every parameter by its name, those that were left out, too."""
    calls: list[inspect.BoundArguments] = []

    def record(*positional: object, **named: object) -> None:
        bound = inspect.signature(function).bind(*positional, **named)
        bound.apply_defaults()
        calls.append(bound)
        raise _Called

    monkeypatch.setattr(f"{function.__module__}.{function.__name__}", record)
    with pytest.raises(_Called):
        main.main(list(command), standalone_mode=False)
    return calls[0].arguments


def _defaults_of(function: Callable[..., object]) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.default is not entry.empty}


def test_a_command_without_options_calls_its_function_with_the_function_s_own_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nxm_export.graph.exporter import export
    from nxm_export.pipeline.engine_timing import bench_engines

    for function, command in ((export, ["export", "c", "--out", "o"]), (bench_engines, ["bench", "e"])):
        defaults = _defaults_of(function)
        arguments = _arguments_of(monkeypatch, function, command)
        assert {name: arguments[name] for name in defaults} == defaults


def test_a_build_without_options_is_told_what_a_caller_without_arguments_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from engines.base import BuildOptions
    from nxm_export.pipeline.engine_builds import DataProfiles, build_engine
    from nxm_export.pipeline.sparsity_twins import TwinGraphs

    command = ["build", "graph.onnx", "--out", "o"]
    arguments = _arguments_of(monkeypatch, build_engine, command)
    options = arguments["options"]
    assert isinstance(options, BuildOptions)
    assert replace(options, progress=silent, profiles=()) == BuildOptions()
    assert arguments["name"] == _defaults_of(build_engine)["name"]
    assert _arguments_of(monkeypatch, build_engine, [*command, "--lengths", "f"])["profiles_from"] == DataProfiles("f")
    monkeypatch.undo()
    from nxm_export.pipeline.engine_builds import build_twin_engines

    graphs = _arguments_of(monkeypatch, build_twin_engines, [*command, "--backend", "trt", "--twins"])["graphs"]
    assert graphs == TwinGraphs()


def test_a_run_without_options_asks_for_what_a_caller_without_arguments_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nxm_export.pipeline import run
    from nxm_export.pipeline.request import Request
    from nxm_export.pipeline.run import compress_model

    monkeypatch.setattr(run, "head_notice", lambda request: None)  # it looks at the model
    command = ["compress", "m", "--train", "t", "--dev", "d", "--out", "o"]
    request = _arguments_of(monkeypatch, compress_model, command)["request"]
    assert request == Request(
        model="m",
        task="classification",
        train="t",
        dev="d",
        spec=WeightSpec.parse("2:4+W8"),
        settings=Settings(),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--recipe", "asp"), "'asp' is not one of 'admm', 'obs-refit'"),
        (("--batch-size", "0"), "0 is not in the range x>=1"),
        (("--augment", "1"), "1.0 is not in the range 0<=x<1"),
        (("--average", "nan"), "is not a finite number"),
        (("--learning-rate", "0"), "0 is not a positive number"),
        (("--output-limit", "nan"), "is not a finite number"),
        (("--seed", str(2**32)), "is not in the range 0<=x<=4294967295"),
        (("--batch-size", "1_6"), "'1_6' is not a whole number in plain digits"),
        (("--train-limit", "１０"), "'１０' is not a whole number in plain digits"),
        (("--augment", "0_0.5"), "'0_0.5' is not a finite number in plain digits"),
        (("--epochs", "1_0"), "'1_0' is not a finite number in plain digits"),
        (("--output-limit", "infinity"), "'infinity' is not a finite number in plain digits"),
    ],
)
def test_the_ranges_of_the_settings_hold_on_the_command_line(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(click.BadParameter) as error:
        main.commands["compress"].make_context("compress", ["m", "--out", "o", *given])
    assert message in error.value.message


@pytest.mark.parametrize("asked", [("--placement", "attention"), ("--residual", "int8")])
def test_quantized_activations_are_not_dropped_silently_where_weights_stay_unquantized(asked: tuple[str, str]) -> None:
    command = ["compress", "m", "--train", "t", "--dev", "d", "--out", "o", "--weight-bits", "none", *asked]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert (
        f"{asked[0].removeprefix('--')} {asked[1]}: activations are quantized only where weights are" in result.output
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("build g --lowering gemm", "--lowering is of the graphs of --twins"),
        ("build g --backend trt --target trt8", "--target is of the graphs of --twins"),
        ("build g --backend trt --max-profiles 2", "--max-profiles is for --lengths"),
        ("bench e --clients 8", "--clients is for --serve"),
        ("bench e --data d --task reranking", "--task is for --serve"),
        ("bench e --data d --shape 1x32", "--shape is not for --data"),
        ("bench --serve u --name m --data d --shape 1x32", "--shape is for ENGINEs that are timed here"),
        ("bench --serve u --name m --data d --threads 1", "--threads is for ENGINEs that are timed here"),
        ("bench --serve u --name m --data d --encoding json", "--encoding is for tokens, which need an ENGINE"),
        ("bench e --serve u --name m --data d --task reranking", "--task is that of ENGINE"),
        ("doctor --gpu L4", "--gpu needs PATH"),
        ("doctor --parse", "--parse needs PATH"),
    ],
)
def test_an_option_that_nothing_would_read_is_wrong_usage(command: str, message: str) -> None:
    words = command.split()
    result = CliRunner().invoke(main, [*words, "--out=o"] if words[0] == "build" else words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


OF_TENSORRT = ("--level=3", "--workspace=64", "--build-route=x")
OF_GPUS = ("--profile=1x8", "--sparse=never", "--max-batch-tokens=64")


@pytest.mark.parametrize(
    ("backend", "given"),
    [
        *((backend, given) for backend in ("ort", "openvino", "auto") for given in (*OF_TENSORRT, *OF_GPUS)),
        *(("cusparselt", given) for given in OF_TENSORRT),
    ],
)
def test_a_build_refuses_what_its_backend_does_not_read(
    backend: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest_backend, "candidates", lambda: ("ort", "openvino"))  # as where there is no GPU
    result = CliRunner().invoke(main, ["build", "gone.onnx", "--out=o", f"--backend={backend}", given])
    assert result.exit_code in (1, 2)
    assert "has no use for" in result.output or "--backend auto takes no" in result.output
    assert "gone.onnx" not in result.output


def test_twins_are_for_sparse_kernels() -> None:
    for given, message in (((), "ort has none"), (("--backend=trt", "--sparse=never"), "leave --sparse never out")):
        result = CliRunner().invoke(main, ["build", "gone", "--twins", "--out=o", *given])
        assert (result.exit_code, message in result.output) == (1, True), result.output


def test_a_number_that_is_given_twice_counts_once() -> None:
    assert numbers_of("8,1, 8", "--clients", "numbers of clients") == (8, 1)


@pytest.mark.parametrize("side", ["1_0", "１０", "0", "9" * 5000, ""])
def test_shapes_and_lists_take_plain_digits_alone(side: str) -> None:
    with pytest.raises(click.BadParameter):
        shape_of(f"8x{side}")
    with pytest.raises(click.BadParameter):
        numbers_of(f"8,{side}", "--clients", "numbers of clients")


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("search", ("--compression", "0_0.9")),
        ("search", ("--compression", "nan")),
        ("bench", ("--seconds", "inf")),
        ("serve", ("--timeout-ms", "inf")),
    ],
)
def test_no_option_takes_a_number_that_is_none(command: str, given: tuple[str, ...]) -> None:
    with pytest.raises(click.BadParameter, match="is not a finite number in plain digits"):
        main.commands[command].make_context(command, ["x", *given])


@pytest.mark.parametrize("share", ["6_0%", "６０%", "6%0", "infinity", "nan", "0", "101%"])
def test_a_share_of_weights_is_a_plain_number(share: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path), "--require-sparse", share])
    assert (result.exit_code, "is not a share" in result.output) == (2, True)


def test_a_list_of_a_settings_option_takes_plain_numbers_alone() -> None:
    for name, given in (("halving", "1_0,20"), ("pareto", "0.9,0_0.8")):
        with pytest.raises(PlanError, match="is not a list of"):
            settings_of(SearchSettings, {name: given})
