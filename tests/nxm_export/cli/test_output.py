"""Messages on a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.cli.output import one_line, serving_of
from tests.support import exact_engine


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain, with \u00e9 and \u4e2d", "plain, with \u00e9 and \u4e2d"),
        ("two\n  lines\r\n\nand a third\n", "two lines and a third"),
        ("\x1b[31mred\x07\x00", "\\x1b[31mred\\x07\\x00"),
        ("right\u202eleft\ud800", "right\\u202eleft\\ud800"),
        ("", ""),
    ],
)
def test_a_message_is_one_line_without_control_characters(text: str, line: str) -> None:
    assert one_line(text) == line


def test_of_several_engines_none_is_proposed_to_be_served() -> None:
    """The first of them is what the others are measured against: often the slow one."""
    assert serving_of([Path("my engine")]) == ("nxm serve 'my engine' --text", "")
    assert serving_of([Path("dense"), Path("int8")]) == ("nxm serve ENGINE --text", "the one that you keep")


@pytest.mark.parametrize("command", ["show", "report", "serve"])
def test_a_path_that_the_system_refuses_is_no_traceback(command: str) -> None:
    """A name that is too long stands for what a test as root cannot have: a directory that may not be read."""
    name = "a" * 300
    done = CliRunner().invoke(main, [command, f"m={name}" if command == "serve" else name])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.startswith(f"nxm: {name}")
    assert "(File name too long)" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_without_its_streams_does_its_work(closed: str, tmp_path: Path) -> None:
    """As a supervisor may start it; the status says the rest."""
    engine = exact_engine.build(tmp_path / "engine")
    command = [sys.executable, "-m", "nxm_export", "inspect", str(engine)]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
