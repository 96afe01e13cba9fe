"""Write the drawings of README and docs: ``docs/images/NAME-light.svg`` and ``NAME-dark.svg``.

python -m tools.drawings
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nxm_export.storage.atomic import write_atomic
from tools import ROOT
from tools.drawings.colours import THEMES, Colours
from tools.drawings.terminal import SCENES, picture
from tools.rendering import render

IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Box:
    """A file of the pipeline, what it holds, and what checks it."""

    x: float
    title: str
    holds: str
    check: tuple[str, ...] = ()
    width: float = 176.0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class Arrow:
    """From a box to the next one, by a command."""

    start: float
    end: float
    command: str


@dataclass(frozen=True)
class Point:
    """Of the drawing, in pixels; or of the plane of two weights."""

    x: float
    y: float


@dataclass(frozen=True)
class Step:
    """X and Z of one iteration, in pixels."""

    x: Point
    z: Point


@dataclass(frozen=True)
class Ellipse:
    """A line of equal error: half its axes, in pixels."""

    major: float
    minor: float


@dataclass(frozen=True)
class Label:
    """Words in the drawing."""

    x: float
    y: float
    text: str
    colour: str
    anchor: str = "start"


def pipeline(colours: Colours) -> str:
    """What becomes of a model, and which command checks each file."""
    left, gap, width = 12.0, 57.0, 176.0
    boxes = [
        Box(left, "your model", "Hugging Face, FP32"),
        Box(left + width + gap, "checkpoint", "2:4 zeros, 2 to 8 bits", ("compress:", "accuracy kept?")),
        Box(left + 2 * (width + gap), "graph", "Q/DQ ONNX, INT8", ("verify:", "2:4 in its integers?")),
        Box(
            left + 3 * (width + gap),
            "engine",
            "ONNX Runtime, TensorRT",
            ("compare: same answers?", "inspect: runs sparse?", "bench: does it pay?"),
        ),
    ]
    commands = ("compress", "export", "build")
    arrows = [
        Arrow(before.x + width, after.x, command)
        for before, after, command in zip(boxes, boxes[1:], commands, strict=False)
    ]
    return render("drawings/pipeline.svg.j2", boxes=boxes, arrows=arrows, colours=colours)


# The example of docs/how-it-works.md: two weights, one of which may stay.
DENSE = np.array([1.0, 0.8])
MOMENTS = np.array([[1.0, 0.9], [0.9, 3.0]])
PENALTY, GROWTH, ITERATIONS = 0.4, 1.25, 9


def admm_steps() -> list[tuple[np.ndarray, np.ndarray]]:
    """X and Z (2,) of every iteration of ``min (W - X) H (W - X)^T  s.t.  X = Z, one of Z's two entries 0``."""
    penalty, dual = PENALTY, np.zeros(2)
    z = DENSE * (np.abs(DENSE) == np.abs(DENSE).max())
    steps = []
    for _ in range(ITERATIONS):
        x = np.linalg.solve(MOMENTS + penalty * np.eye(2), MOMENTS @ DENSE + penalty * z - dual)
        candidate = x + dual / penalty
        z = candidate * (np.abs(candidate) == np.abs(candidate).max())
        dual = dual + penalty * (x - z)
        penalty *= GROWTH
        steps.append((x, z))
    return steps


def admm(colours: Colours) -> str:
    """The iterations in the plane of the two weights, with lines of equal error of the layer's output."""
    origin, scale = Point(110.0, 370.0), 235.0

    def pixel(weights: np.ndarray) -> Point:
        return Point(round(origin.x + scale * weights[0], 1), round(origin.y - scale * weights[1], 1))

    values, vectors = np.linalg.eigh(MOMENTS)
    flat = vectors[:, 0]  # the direction in which the error grows least
    ellipses = [
        Ellipse(round(scale * (level / values[0]) ** 0.5, 1), round(scale * (level / values[1]) ** 0.5, 1))
        for level in (0.05, 0.25, 0.6)
    ]
    dense = pixel(DENSE)
    steps = [Step(pixel(x), pixel(z)) for x, z in admm_steps()]
    first, last = steps[0].z, steps[-1].z
    labels = [
        Label(dense.x + 10, dense.y - 8, "W: the dense weights", colours.text),
        Label(first.x, first.y + 22, "first Z: the larger weight stays", colours.proof, "middle"),
        Label(last.x - 12, last.y + 26, "last Z, and X", colours.proof, "end"),
    ]
    return render(
        "drawings/admm.svg.j2",
        origin=origin,
        dense=dense,
        tilt=round(float(-np.degrees(np.arctan2(flat[1], flat[0]))), 1),
        ellipses=ellipses,
        steps=steps,
        labels=labels,
        colours=colours,
    )


DRAWINGS = {"pipeline": pipeline, "admm": admm}


def drawn() -> dict[Path, str]:
    """Every file and its text."""
    return {
        IMAGES / f"{name}-{theme}.svg": f"{draw(colours)}\n"
        for name, draw in DRAWINGS.items()
        for theme, colours in THEMES.items()
    } | {
        IMAGES / f"terminal-{name}-{theme}.svg": f"{picture(scene, colours)}\n"
        for name, scene in SCENES.items()
        for theme, colours in THEMES.items()
    }


def main() -> None:
    """The command."""
    for path, text in drawn().items():
        write_atomic(path, text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
