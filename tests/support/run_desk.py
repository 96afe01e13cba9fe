"""A tiny encoder and its data, which `nxm run` is called with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from nxm_export.cli import main
from tests.support import tiny

OPTIONS = ["--dense-steps=40", "--steps=24", "--batch-size=16", "--learning-rate=1e-3", "--dense-learning-rate=3e-3"]


class Desk:
    """A directory with a tiny encoder and its data."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.model = tiny.write_model("bert", home / "encoder")
        self.train, self.dev = tiny.write_data(home)

    def arguments(self, out: Path, *more: str, **changed: Path) -> list[str]:
        model, files = changed.pop("model", self.model), {"train": self.train, "dev": self.dev, **changed}
        named = (f"--{name}={path}" for name, path in files.items())
        return ["run", str(model), *named, f"--out={out}", *OPTIONS, *more]

    def nxm(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nxm_export", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(result: Result, message: str, codes: tuple[int, ...] = (1,)) -> None:
    import re

    assert result.exit_code in codes, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert re.search(message, " ".join(result.output.split())), result.output
