"""``nxm search`` as a command line, small enough for a test."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from nxm_export.cli import main

QUICK = ("--samples", "24", "--held-out", "24", "--swaps", "6", "--compression", "0.85", "--threads", "1")


def nxm(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def search(desk: Path, out: Path, *options: str, quick: tuple[str, ...] = QUICK) -> Result:
    return nxm("search", desk / "dense", "--train", desk / "train.tsv", "--out", out, *quick, *options)
