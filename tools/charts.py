"""Charts of the documents as SVG, each for a light and a dark page: ``NAME-light.svg`` and ``NAME-dark.svg``, without a
background of their own. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType


@dataclass(frozen=True)
class Theme:
    """Colours of a page; `series` are told apart on it by who sees red and green alike, too."""

    text: str
    line: str
    series: tuple[str, ...]


THEMES = {
    "light": Theme("#1f2328", "#d1d9e0", ("#2f6fb3", "#c2570c", "#2e8b57", "#8458b3", "#b03a5b", "#66717d")),
    "dark": Theme("#e6edf3", "#3d444d", ("#79b0ec", "#f5a25d", "#6cc796", "#bd9bea", "#ef86a3", "#a9b4c0")),
}


@dataclass(frozen=True)
class Chart:
    """A chart in a document: `name` begins its files, `alt` says what it shows to who cannot see it."""

    name: str
    alt: str

    def files(self, directory: Path) -> list[Path]:
        """One file for each theme."""
        return [directory / f"{self.name}-{theme}.svg" for theme in THEMES]

    def write(self, directory: Path, draw: Callable[[Theme], Figure]) -> None:
        """Draw it for every theme. The same chart is the same bytes."""
        import matplotlib as mpl

        directory.mkdir(parents=True, exist_ok=True)
        for file, theme in zip(self.files(directory), THEMES.values(), strict=True):
            with mpl.rc_context(_style(theme)):
                draw(theme).savefig(file, format="svg", metadata={"Date": None})

    def markup(self, folder: str = "images") -> str:
        """HTML for a document: the reader's theme chooses the file."""
        return (
            "<picture>\n"
            f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{self.name}-dark.svg">\n'
            f'  <img alt="{escape(self.alt)}" src="{folder}/{self.name}-light.svg">\n'
            "</picture>"
        )


def _style(theme: Theme) -> dict[RcKeyType, object]:
    return {
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "axes.edgecolor": theme.line,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "grid.color": theme.line,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "font.size": 10,
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",  # small files, in the reader's own sans-serif
        "svg.hashsalt": "nxm",
    }
