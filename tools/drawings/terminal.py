"""Pictures of a terminal of 80 columns, from what commands really printed.

    python -m tools.tutorial --data DESK        # my-model, train.tsv, dev.tsv
    python -m tools.drawings.terminal DESK      # runs the commands there, and keeps what they print
    python -m tools.drawings                    # draws it

The texts lie in ``tools/drawings/terminal``; a line that begins with ``$`` was typed. DESK keeps its run, so
that a second call is quick.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nxm_export.storage.atomic import write_atomic
from tools.benchmarks.servers import free_port, started
from tools.drawings.colours import Colours
from tools.rendering import render

TEXTS = Path(__file__).parent / "terminal"
COLUMNS = 80
CHARACTER, LINE, MARGIN = 7.8, 18, 16  # pixels, at a font of 13
PORT = 8000

RUN = "nxm run my-model --train train.tsv --dev dev.tsv --dense-steps 180 --steps 120 --out runs/mine"
ENGINES = "runs/mine/engines"
SCENES = {
    "run": RUN,
    "doctor": "nxm doctor runs/mine/onnx/trt/model.onnx --gpu L4 --version 10.3",
    "verify": "nxm verify runs/mine/onnx/cpu/model.onnx --pattern 2:4",
    "bench": f"nxm bench {ENGINES}/ort-cpu-fp32 {ENGINES}/ort-cpu-int8 --shape 1x32 --shape 8x64",
    "serve": f"nxm serve film={ENGINES}/ort-cpu-int8 --text --port {PORT}",
}
BODY = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a good film"]}]}'


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Run the commands of the terminal pictures, and keep what they print.")
    parser.add_argument("desk", type=Path, help="directory with my-model, train.tsv and dev.tsv")
    parser.add_argument("--scene", choices=SCENES, action="append", help="only this one")
    options = parser.parse_args(arguments)
    TEXTS.mkdir(exist_ok=True)
    for name in options.scene or SCENES:
        made = (
            _served(options.desk)
            if name == "serve"
            else f"{typed(SCENES[name])}\n{_printed(SCENES[name], options.desk)}"
        )
        write_atomic(TEXTS / f"{name}.txt", "".join(f"{line.rstrip()}\n" for line in made.splitlines()))
        print(TEXTS / f"{name}.txt")


def typed(command: str) -> str:
    """A command as it is typed into 80 columns."""
    lines = textwrap.wrap(f"$ {command}", COLUMNS - 2, subsequent_indent="    ", break_on_hyphens=False)
    return " \\\n".join(lines)


def _printed(command: str, desk: Path) -> str:
    """What an `nxm` command prints for people: its result, and the command to type next."""
    done = subprocess.run(
        _arguments(command), cwd=desk, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    following = [line for line in done.stderr.splitlines() if line.startswith("next:")]
    return "\n".join([done.stdout.strip(), *(folded for line in following for folded in _folded(line))])


def _served(desk: Path) -> str:
    """What a server logs while it starts, and what it answers."""
    port, log = free_port(), desk / "serve.log"
    command = _arguments(SCENES["serve"].replace(str(PORT), str(port)))
    with started(command, _environment(), port, log, cwd=desk):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/film_text/infer", BODY.encode())
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = response.read().decode()
        logged = log.read_text(encoding="utf-8").strip()
    asked = f"$ curl localhost:{PORT}/v2/models/film_text/infer -d \\\n    '{BODY}'"
    lines = [folded for line in (logged.replace(str(port), str(PORT))).splitlines() for folded in _folded(line)]
    return "\n".join([f"{typed(SCENES['serve'])} &", *lines, *_folded(asked), *_folded(answer)])


def _arguments(command: str) -> list[str]:
    return [sys.executable, "-m", "nxm_export", *shlex.split(command)[1:]]


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONPATH": str(Path.cwd())}


def _folded(line: str) -> list[str]:
    """A line as a terminal breaks it."""
    return [part[i : i + COLUMNS] for part in line.splitlines() for i in range(0, max(len(part), 1), COLUMNS)]


@dataclass(frozen=True)
class Row:
    """A line of the picture."""

    y: float
    text: str
    width: float
    colour: str
    weight: int


def picture(scene: str, colours: Colours) -> str:
    """The SVG of what `scene` printed."""
    lines = (TEXTS / f"{scene}.txt").read_text(encoding="utf-8").splitlines()
    rows, continued, after_command = [], False, False
    for number, line in enumerate(lines):
        command = continued or line.startswith("$ ")
        continued = command and line.endswith("\\")
        colour = colours.command if command else colours.muted if line.startswith("next:") else colours.text
        verdict = after_command and not command
        if line:
            y = MARGIN + LINE * (number + 0.75)
            rows.append(Row(round(y, 1), line, round(len(line) * CHARACTER, 1), colour, 600 if verdict else 400))
        after_command = command
    return render(
        "drawings/terminal.svg.j2",
        rows=rows,
        title=f"What {SCENES[scene].split(' -')[0]} prints",
        width=round(COLUMNS * CHARACTER + 2 * MARGIN),
        height=LINE * len(lines) + 2 * MARGIN,
        margin=MARGIN,
        colours=colours,
    )


if __name__ == "__main__":
    main()
