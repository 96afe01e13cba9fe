"""Every command: help that one can learn from, one name for one thing, choices that are choices, JSON or a word that
there is none."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

from engines.base import BACKENDS
from nxm_export.cli import main
from nxm_export.cli.group import SECTIONS, Command
from nxm_export.contract.choices import BACKEND_NAMES, TARGETS
from nxm_export.graph.targets import TARGETS as GRAPH_TARGETS

COMMANDS = sorted(main.commands)
# What an argument is called, by what it is.
ARGUMENTS = {
    "MODEL",  # a directory or hub id
    *("CHECKPOINT", "GRAPH", "ENGINE", "RUN"),  # directories that the stages write
    "PATH",  # of several of these
    *("FILE", "TEXT", "SHELL"),
}
# Options of one name that take their values from different sets, and why.
DIFFERENT_CHOICES = {
    "--backend": "build makes engines of all backends, and doctor judges for TensorRT",
    "--placement": "a graph keeps some of the quantizers that were trained",
}


def help_of(*command: str, option: str = "--help") -> str:
    result = CliRunner().invoke(main, [*command, option], terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output


def options() -> Iterator[tuple[str, str, click.Option]]:
    """(command, name, option) of every option."""
    for name in COMMANDS:
        for parameter in main.commands[name].params:
            if isinstance(parameter, click.Option):
                yield from ((name, flag, parameter) for flag in parameter.opts if flag.startswith("--"))


def test_no_option_shows_a_bound_that_it_has_not() -> None:
    """Click writes x<=None for a range without any."""
    for name, flag, option in options():
        shown = option.get_help_record(click.Context(main.commands[name]))
        assert shown is None or "None" not in shown[1], f"{name} {flag}: {shown}"


def test_every_command_stands_in_one_section() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == COMMANDS
    text = help_of()
    for section, names in SECTIONS.items():
        block = text.partition(f"\n{section}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in block.splitlines()] == list(names)
    assert "..." not in text.partition("Make:")[2], "what a command does fits beside its name"
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_screen_with_two_examples(name: str) -> None:
    command = main.commands[name]
    assert isinstance(command, Command)
    text = help_of(name)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    assert len(command.examples) == 2
    assert all(f"\n  {example}\n" in text for example in command.examples)
    assert text.index("\nExamples:") < text.index("\nOptions:")


def arguments_of(example: str, name: str) -> list[str]:
    """What an example gives its command, as a shell splits it."""
    words = shlex.split(example.partition(" > ")[0])
    return words[words.index(name) + 1 :]


@pytest.mark.parametrize("name", sorted(main.commands.keys() - {"completion"}))
def test_examples_are_right_usage(name: str) -> None:
    """They are parsed, not run."""
    command = main.commands[name]
    assert isinstance(command, Command)
    for example in command.examples:
        assert example.split()[:2] == ["nxm", name]
        assert command.make_context(name, arguments_of(example, name)) is not None


def test_rare_options_are_under_help_all() -> None:
    for name in COMMANDS:
        command = main.commands[name]
        assert isinstance(command, Command)
        shown = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        text = help_of(name, option="--help-all") if command.common else help_of(name)
        assert all(re.search(rf"{option.opts[0]}\b", text) for option in shown)
        assert set(command.common) <= {str(parameter.name) for parameter in command.params}
        if command.common:
            rare = next(option for option in shown if option.name not in command.common and option.name != "json")
            assert not re.search(rf"^  {rare.opts[0]}\b", help_of(name), re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_json_or_says_that_there_is_none(name: str) -> None:
    has = any(flag == "--json" for command, flag, _ in options() if command == name)
    assert has == ("there is no --json" not in " ".join(help_of(name).split()))


def test_an_argument_has_one_name_everywhere() -> None:
    for name in COMMANDS:
        for parameter in main.commands[name].params:
            if isinstance(parameter, click.Argument):
                metavar = parameter.metavar or str(parameter.name).upper()
                assert set(re.findall(r"[A-Z]{2,}", metavar)) <= ARGUMENTS | {"NAME", "VERSION"}, (name, metavar)


def test_an_option_of_one_name_is_one_thing_everywhere() -> None:
    """A flag in one command is no column in another, and choices are the same."""
    seen: dict[str, tuple[str, click.Option]] = {}
    for name, flag, option in options():
        first, known = seen.setdefault(flag, (name, option))
        assert known.is_flag == option.is_flag, f"{flag} is a flag in one of {first} and {name}, and none in the other"
        if flag not in DIFFERENT_CHOICES:
            both = [getattr(one.type, "choices", None) for one in (known, option)]
            assert both[0] == both[1], f"{flag} has other choices in {first} than in {name}"
            assert known.metavar == option.metavar, f"{flag} is another word in {first} than in {name}"
    arguments = {str(p.name) for c in main.commands.values() for p in c.params if isinstance(p, click.Argument)}
    assert "--model" not in seen, "MODEL is an argument"
    assert "model" in arguments


def test_names_of_backends_and_targets_are_those_of_the_code() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES
    assert tuple(GRAPH_TARGETS) == TARGETS


def refused(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    return result


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "g", "--out", "o", "--backend", "tpu"),
        ("build", "c", "--out", "o", "--twins", "--target", "tpu"),
        ("export", "c", "--out", "o", "--target", "tpu"),
        ("compress", "m", "--out", "o", "--weight-bits", "9"),
        ("compress", "m", "--out", "o", "--task", "chess"),
        ("doctor", "g", "--backend", "ort"),
        ("doctor", "g", "--gpu", "abacus"),
        ("completion", "cmd"),
    ],
    ids=" ".join,
)
def test_a_wrong_choice_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    refused(*arguments)


def test_an_option_with_few_values_says_them_to_the_shell() -> None:
    """What completes a word knows the values of every choice."""
    for _, flag, option in options():
        if isinstance(option.type, click.Choice):
            context = click.Context(main)
            values = [item.value for item in option.type.shell_complete(context, option, "")]
            assert values == [str(choice) for choice in option.type.choices], flag
