"""``nxm.toml``: every option of `nxm run` is in it, what it says is what the command line would say, and what it cannot
say is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import click
import pytest
from click.core import ParameterSource
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from nxm_export.cli import main
from nxm_export.cli.config_file import config_text, keys_of

RUN = main.commands["run"]
KEYS = keys_of(RUN)


def parsed(*arguments: str) -> click.Context:
    return RUN.make_context("run", list(arguments))


def written(directory: Path, text: str) -> Path:
    file = directory / "nxm.toml"
    file.write_text(text, encoding="utf-8")
    return file


def init(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["init", *arguments])


def test_init_writes_every_option_with_its_default(tmp_path: Path) -> None:
    file = tmp_path / "nxm.toml"
    assert init("film", "--out", str(file)).exit_code == 0
    lines = file.read_text(encoding="utf-8").splitlines()
    assert {line.lstrip("# ").partition(" = ")[0] for line in lines if " = " in line} == KEYS.keys()
    plain = parsed()
    active = {"model": "film", "train": "train.tsv", "dev": "dev.tsv", "out": Path("runs/mine")}
    assert parsed("--config", str(file)).params == {**plain.params, **active}


def test_every_commented_default_is_the_default(tmp_path: Path) -> None:
    """With all comments taken off, those without a value left out, the command is what it is without a file."""
    text = config_text(RUN, {})
    lines = [line.removeprefix("# ") for line in text.splitlines() if " = " in line and line.startswith("# ")]
    plain = parsed()
    defaults = {key: RUN.params[RUN.params.index(parameter)].get_default(plain) for key, parameter in KEYS.items()}
    told = [line for line in lines if isinstance(defaults[line.partition(" = ")[0]], (bool, int, float, str))]
    assert len(told) >= 20
    assert parsed("--config", str(written(tmp_path, "\n".join(told)))).params == plain.params


def test_the_command_line_wins_and_the_file_wins_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, 'pattern = "1:4"\nepochs = 2\nkeep-dense = ["*.q", "*.k"]\ndistill = false\n')
    context = parsed("--config", str(file), "--epochs", "9")
    assert context.params["pattern"] == "1:4"
    assert context.params["epochs"] == 9.0
    assert context.params["keep_dense"] == ("*.q", "*.k")
    assert context.params["distill"] is False
    assert context.get_parameter_source("pattern") is not ParameterSource.DEFAULT, "it is asked for"


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ('patern = "2:4"', "unknown key 'patern'; did you mean pattern?", 1),
        ("json = true", "unknown key 'json'", 1),
        ("distill = 1", "distill is true or false, got 1", 1),
        ('keep-dense = "*.q"', "keep-dense is a list of texts", 1),
        ("epochs = true", "epochs is one number or text, got True", 1),
        ("[run]\nepochs = 2", "unknown key 'run'", 1),
        ("steps = 2.5", "'2.5' is not a whole number", 2),
        ('recipe = "asp"', "is not one of", 2),
        ("epochs = = 2", "not a table in TOML", 1),
        ('search = "1.5"', "not in the range", 2),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_a_file_cannot_say_is_named(tmp_path: Path, text: str, message: str, code: int) -> None:
    result = CliRunner().invoke(main, ["run", "--config", str(written(tmp_path, text))])
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--config", str(tmp_path / "none.toml")])
    assert result.exit_code == 1
    assert "none.toml: cannot be read" in result.stderr


def test_a_python_without_a_parser_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    def decode(*_: object, **__: object) -> object:
        raise ImportError("no tomllib")

    monkeypatch.setattr(msgspec.toml, "decode", decode)
    result = CliRunner().invoke(main, ["run", "--config", str(written(tmp_path, "epochs = 2"))])
    assert result.exit_code == 1
    assert "needs Python 3.11 or newer, or the package tomli" in result.stderr


def test_init_overwrites_nothing_by_itself(tmp_path: Path) -> None:
    file = written(tmp_path, "mine")
    result = init("--out", str(file))
    assert result.exit_code == 1
    assert "give --force" in result.stderr
    assert file.read_text() == "mine"
    assert init("--out", str(file), "--force").exit_code == 0
    assert file.read_text() != "mine"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_any_text_comes_back_as_it_was(model: str) -> None:
    text = config_text(RUN, {"model": model})
    assert tomllib.loads(text)["model"] == model


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ((), "missing MODEL, --train, --dev, --out (or use --demo, or --config)", 2),
        (("--demo", "film"), "--demo brings its own model and data; drop MODEL", 2),
        (("m", "--train=t", "--dev=d", "--out=o", "--plan=p", "--search=0.8"), "give one of them", 2),
        (("m", "--train=t", "--dev=d", "--out=o", "--plan=p", "--pattern=2:4"), "--pattern would be dropped", 1),
        (("m", "--train=t", "--dev=d", "--out=o", "--search=0.8", "--weight-bits=4"), "--weight-bits would be", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_run_is_told_one_plan(arguments: tuple[str, ...], message: str, code: int) -> None:
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
