"""Pictures of a terminal, from what commands really printed: the outputs that docs/tutorial.md shows."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from tools.drawings.colours import Colours
from tools.rendering import render
from tools.tutorial import PAGE, STEP

COLUMNS = 80  # at least
CHARACTER, LINE, MARGIN = 7.8, 18, 16  # pixels, at a font of 13


@dataclass(frozen=True)
class Scene:
    """A command of the tutorial, and how the part of its step's output that it printed begins.

    The part ends where a line begins in the same way again or with `until`, or with the step.
    """

    command: str
    begins: str
    until: str = ""


SCENES = {
    "run": Scene("nxm run my-model --train train.tsv --dev dev.tsv --dense-steps", "Passed:"),
    "verify": Scene("nxm verify", "graph/model.onnx"),
    "doctor": Scene("nxm doctor", "Run here:"),
    "bench": Scene("nxm bench engine-dense", "Against ", until="An engine of"),
    "serve": Scene("nxm serve", "next:"),
}


@dataclass(frozen=True)
class Row:
    """A line of the picture, in pixels."""

    y: float
    text: str
    width: float
    colour: str
    weight: int


def picture(scene: Scene, colours: Colours) -> str:
    """The SVG of what `scene` printed. The tutorial is read again each time."""
    command, printed = shown(scene, PAGE.read_text(encoding="utf-8"))
    columns = max(COLUMNS, *map(len, printed))
    typed = textwrap.wrap(f"$ {command}", columns - 2, subsequent_indent="    ", break_on_hyphens=False)
    lines = [(line, colours.command, 400) for line in [*(f"{line} \\" for line in typed[:-1]), typed[-1]]]
    lines += [(line, colours.text, 400 if number else 600) for number, line in enumerate(printed)]
    rows = [
        Row(round(MARGIN + LINE * (number + 0.75), 1), line, round(len(line) * CHARACTER, 1), colour, weight)
        for number, (line, colour, weight) in enumerate(lines)
        if line
    ]
    return render(
        "drawings/terminal.svg.j2",
        rows=rows,
        title=f"What {' '.join(command.split()[:2])} prints",
        width=round(columns * CHARACTER + 2 * MARGIN),
        height=LINE * len(lines) + 2 * MARGIN,
        margin=MARGIN,
        colours=colours,
    )


def shown(scene: Scene, page: str) -> tuple[str, list[str]]:
    """The whole command of a scene and the lines that it printed; raises `LookupError` where the page lacks one."""
    for step in STEP.finditer(page):
        typed = [line for line in step["commands"].replace("\\\n", " ").splitlines() if line.startswith(scene.command)]
        lines = step["shown"].splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(scene.begins)]
        if typed and starts:
            ends = [n for n, line in enumerate(lines) if scene.until and line.startswith(scene.until)]
            printed = lines[starts[0] : min((n for n in (*starts, *ends) if n > starts[0]), default=None)]
            while not printed[-1].strip():
                printed.pop()
            return " ".join(typed[-1].split()), [line.rstrip() for line in printed]
    raise LookupError(f"no step of the tutorial types {scene.command!r} and prints a line with {scene.begins!r}")
