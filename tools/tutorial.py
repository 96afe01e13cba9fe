"""Make what docs/tutorial.md starts from, and fill in what its commands print.

    python -m tools.tutorial --data DIR     # my-model, train.tsv and dev.tsv, out of the demo's packages
    python -m tools.tutorial --write        # runs every command, and writes its output into the page
    python -m tools.drawings                # the terminal pictures, which show some of these outputs

Every block of commands (``sh``) with a block of output (``text``) right behind it is run, in the order of the page,
in a directory of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engines.passport import cpu_device
from nxm_export.pipeline.demo import model_directory, write_data
from nxm_export.storage.atomic import write_atomic
from tools import ROOT
from tools.provenance import versions
from tools.rendering import write_section

PAGE = ROOT / "docs" / "tutorial.md"
STEP = re.compile(
    r"^```sh\n(?P<commands>(?:(?!```).*\n)+)```\n\n```text\n(?P<shown>(?:(?!```).*\n)*)```$", re.MULTILINE
)
COLUMNS = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, help="write the model and the data of the tutorial into this directory")
    parser.add_argument("--write", action="store_true", help="run the tutorial and write its outputs into the page")
    options = parser.parse_args(arguments)
    if options.data:
        write_desk(options.data)
    if options.write:
        with tempfile.TemporaryDirectory() as desk:
            write_desk(Path(desk))
            write_atomic(PAGE, with_outputs(PAGE.read_text(encoding="utf-8"), Path(desk)))
        packages = ", ".join(f"{name} {version}" for name, version in versions(["torch", "onnxruntime"]).items())
        where = f"Machine: {cpu_device().get('name', 'unknown CPU')}, {os.cpu_count()} cores; {packages}."
        write_section(PAGE, "tools.tutorial", where)


def write_desk(directory: Path) -> None:
    """``my-model``, ``train.tsv`` and ``dev.tsv`` in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model_directory(), directory / "my-model")
    write_data(directory)


def with_outputs(page: str, desk: Path) -> str:
    """`page` with the output of every step, run in `desk`."""

    def filled(step: re.Match[str]) -> str:
        outputs = [run(command, desk) for command in commands(step["commands"])]
        shown = "\n\n".join(output for output in outputs if output)
        return f"```sh\n{step['commands']}```\n\n```text\n{shown}\n```"

    return STEP.sub(filled, page)


def commands(block: str) -> list[list[str]]:
    """The commands of a block, as arguments; a backslash at the end of a line goes on in the next one."""
    lines = block.replace("\\\n", " ").splitlines()
    return [split for line in lines if (split := shlex.split(line, comments=True))]


def run(command: Sequence[str], desk: Path) -> str:
    """What an `nxm` command prints on stdout; raises `CalledProcessError` where it fails."""
    program, *rest = command
    assert program == "nxm", f"only nxm is expected in the tutorial: {command}"
    print("nxm", *rest, file=sys.stderr)
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "nxm_export", *rest]
    done = subprocess.run(arguments, cwd=desk, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


if __name__ == "__main__":
    main()
