"""What people wrote is not overwritten by a page or a card, unless they say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxm_export.cli import main


@pytest.mark.parametrize("command", [["card", "ENGINE"], ["report", "ENGINE"]], ids=["card", "report"])
@pytest.mark.parametrize("there", ["file", "link", "dangling", "directory"])
def test_what_is_there_is_refused_and_left_alone(
    command: list[str], there: str, tiny_engine: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "README.md"
    if there == "directory":
        out.mkdir()
    elif there == "file":
        out.write_text("mine")
    else:
        (tmp_path / "target").write_text("mine")
        out.symlink_to(tmp_path / ("target" if there == "link" else "nowhere"))
    arguments = [str(tiny_engine("ort")) if word == "ENGINE" else word for word in command]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert result.exit_code == 1
    reason = "is a directory" if there == "directory" else "exists and would be overwritten; give --force"
    assert f"nxm: {out} {reason}" in result.output
    assert out.is_dir() if there == "directory" else there == "dangling" or out.read_text() == "mine"


def test_a_card_replaces_it_when_told_to(tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    out.write_text("mine")
    result = CliRunner().invoke(main, ["card", str(tiny_engine("ort")), "--out", str(out), "--force"])
    assert result.exit_code == 0, result.output
    assert "mine" not in out.read_text()


def test_force_replaces_no_directory(tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["card", str(tiny_engine("ort")), "--out", str(tmp_path), "--force"])
    assert (result.exit_code, f"{tmp_path} is a directory" in result.output) == (1, True)


@pytest.mark.parametrize("name", ["passport.json", "model.onnx"])
def test_force_replaces_no_file_of_what_is_shown(name: str, tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine("ort"), engine)
    (tmp_path / "link").symlink_to(engine)
    before = (engine / name).read_bytes()
    for out in (engine / name, tmp_path / "link" / name):
        result = CliRunner().invoke(main, ["card", str(engine), "--out", str(out), "--force"])
        assert (result.exit_code, "is a file of what is shown" in result.output) == (1, True)
    assert (engine / name).read_bytes() == before
    (engine / "README.md").write_text("an older card")
    result = CliRunner().invoke(main, ["card", str(engine), "--out", str(engine / "README.md"), "--force"])
    assert result.exit_code == 0, result.output
