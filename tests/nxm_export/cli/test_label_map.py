"""``--label-map`` and notes of the command line."""

from __future__ import annotations

import warnings

import click
import pytest
from click.testing import CliRunner

from nxm_export.cli.group import main
from nxm_export.cli.options import columns_of
from nxm_export.errors import notice


def test_a_label_map_is_read_label_by_label() -> None:
    assert columns_of(None, None, None, "0=bad, 1 = very good,-1=none").label_map == {
        "0": "bad",
        "1": "very good",
        "-1": "none",
    }
    assert columns_of(None, None, None).label_map == {}


@pytest.mark.parametrize("text", ["0", "0=", "=a", "0=a,0=b", "0=a,1"])
def test_a_map_that_leaves_something_open_is_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="does not say once for each label"):
        columns_of(None, None, None, text)


@pytest.mark.parametrize("command", ["run", "compress", "search", "compare"])
def test_commands_that_read_labels_have_it(command: str) -> None:
    assert any("--label-map" in parameter.opts for parameter in main.commands[command].params)


def test_a_note_is_one_line_on_stderr_said_once() -> None:
    @main.command("say")
    def say() -> None:
        for _ in range(2):
            notice("the labels are numbers")
            with warnings.catch_warnings():  # as loading a model does
                warnings.simplefilter("ignore")
        click.echo("{}")

    try:
        result = CliRunner().invoke(main, ["say"])
    finally:
        main.commands.pop("say")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "{}\n", "note: the labels are numbers\n")
