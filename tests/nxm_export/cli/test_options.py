"""Options of the command line and the settings that they stand for: every one is there, with the setting's own default."""

from __future__ import annotations

from dataclasses import fields

import click
import pytest

from compressors.search.settings import SearchSettings
from compressors.settings import Settings, options_of
from nxm_export.cli import main
from nxm_export.cli.options import settings_of

# Settings that are for callers in Python alone. A new field is an option, or stands here.
PYTHON_ONLY = {
    Settings: {
        *("dense_freeze_embeddings", "admm_share", "dual_updates", "damping", "strength", "residual_gate"),
        *("sr_ste_share", "sr_ste_decay", "losses", "calibration_samples", "percentile"),
    },
    SearchSettings: {"batch_size", "percentile", "latencies"},
}
COMMANDS = [("run", Settings), ("compress", Settings), ("search", SearchSettings)]


@pytest.mark.parametrize("kind", [Settings, SearchSettings])
def test_a_field_of_the_settings_is_an_option_or_said_to_be_none(kind: type[Settings] | type[SearchSettings]) -> None:
    options = {name for name, _ in options_of(kind)}
    assert options.isdisjoint(PYTHON_ONLY[kind])
    assert options | PYTHON_ONLY[kind] == {entry.name for entry in fields(kind)}


@pytest.mark.parametrize(("command", "kind"), COMMANDS)
def test_every_option_of_the_settings_is_on_the_command_line(
    command: str, kind: type[Settings] | type[SearchSettings]
) -> None:
    parameters = {str(parameter.name): parameter for parameter in main.commands[command].params}
    for name, option in options_of(kind):
        flag = option.flag or f"--{name.replace('_', '-')}"
        assert flag in parameters[name].opts
        assert getattr(parameters[name], "help", None) == option.help or command == "search"


@pytest.mark.parametrize(("command", "kind"), COMMANDS)
def test_a_command_without_options_has_the_settings_of_a_caller_without_arguments(
    command: str, kind: type[Settings] | type[SearchSettings]
) -> None:
    given = ["model", "--train", "t", "--out", "o"] if command != "run" else []
    context = main.commands[command].make_context(command, given)
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
    ("given", "message"),
    [
        (("--recipe", "asp"), "'asp' is not one of 'obs', 'nxm'"),
        (("--batch-size", "0"), "0 is not in the range x>=1"),
        (("--augment", "1"), "1.0 is not in the range 0<=x<1"),
        (("--learning-rate", "0"), "0 is not a positive number"),
        (("--output-limit", "nan"), "nan is no limit"),
        (("--seed", str(2**32)), "is not in the range 0<=x<=4294967295"),
    ],
)
def test_the_ranges_of_the_settings_hold_on_the_command_line(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(click.BadParameter) as error:
        main.commands["compress"].make_context("compress", ["m", "--out", "o", *given])
    assert message in error.value.message
