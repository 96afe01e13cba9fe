"""Make what docs/tutorial.md starts from, and fill in what its commands print.

    python -m tools.tutorial --data DIR     # my-model, train.tsv and dev.tsv, out of the demo's packages
    python -m tools.tutorial --write        # runs every command, and writes its output into the page
    python -m tools.drawings                # the terminal pictures, which show some of these outputs

Every block of commands (``sh``) with a block of output (``text``) right behind it is run, in the order of the page,
in a directory of its own. A server runs in a terminal of its own until it has answered the request that it prints.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.devices import cpu_device
from nxm_export.pipeline.demo import model_directory, write_data
from nxm_export.storage.atomic import write_atomic
from tools import ROOT
from tools.provenance import versions
from tools.rendering import write_section

PAGE = ROOT / "docs" / "tutorial.md"
STEP = re.compile(
    r"^```sh\n(?P<commands>(?:(?!```).*\n)+)```\n\n```text\n(?P<shown>(?:(?!```).*\n)*)```$", re.MULTILINE
)
COLUMNS = 80
SERVER_SECONDS = 120.0
QUIET = {"curl": ("-s",)}


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
    if rest[0] == "serve":
        return served(arguments, desk, environment)
    done = subprocess.run(arguments, cwd=desk, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


def served(arguments: Sequence[str], desk: Path, environment: Mapping[str, str]) -> str:
    """What a server prints on a terminal until it is ready, then the request that it proposes and its answer.

    SIGTERM ends it. Raises `RuntimeError` where it is not ready in time.
    """
    ours, terminal = pty.openpty()
    with subprocess.Popen(
        arguments, cwd=desk, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as server:
        os.close(terminal)
        try:
            printed = _until_ready(ours)
            proposed = printed.partition("next: ")[2].partition("#")[0].strip()
            program, *rest = shlex.split(proposed)
            answer = subprocess.run(
                [program, *rest, *QUIET.get(program, ())],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=SERVER_SECONDS,
            )
        finally:
            server.terminate()
            os.close(ours)
    shown = [*printed.splitlines(), "", f"$ {proposed}", *answer.stdout.splitlines()]
    return "\n".join(map(as_wide_as_a_terminal, shown))


def _until_ready(terminal: int) -> str:
    printed, late = b"", time.monotonic() + SERVER_SECONDS
    while b"  ready" not in printed:
        if not select.select([terminal], [], [], max(0.0, late - time.monotonic()))[0]:
            raise RuntimeError(f"the server is not ready in {SERVER_SECONDS:.0f} seconds:\n{printed.decode()}")
        try:
            printed += os.read(terminal, 4096)
        except OSError as error:  # nobody holds the other end any more
            raise RuntimeError(f"the server ended:\n{printed.decode()}") from error
    while select.select([terminal], [], [], 0.2)[0]:  # the rest of that line
        printed += os.read(terminal, 4096)
    return printed.decode().replace("\r\n", "\n")


def as_wide_as_a_terminal(line: str) -> str:
    """A line that a terminal of `COLUMNS` shows in several."""
    return "\n".join(line[start : start + COLUMNS].rstrip() for start in range(0, max(1, len(line)), COLUMNS))


if __name__ == "__main__":
    main()
