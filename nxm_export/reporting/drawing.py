"""What every picture of the page shares: its size and style, and how matplotlib's SVG becomes part of the page.

matplotlib writes inline styles, which a strict content security policy refuses, and fixed colours, which suit one
theme. `svg.inline` turns styles into attributes, and placeholder colours into classes that the page's style sheet
colours in both themes. Text stays text, ids are unique within the page, and every picture carries a title and a
description for who cannot see it.

Pictures are drawn for a telephone: `WIDTH` fills a page of 390 px with text of about 10 px, and the style sheet lets
none grow beyond 1.7 times that.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from nxm_export.reporting.svg import INK, LINE, MUTED, inline

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nxm-report",
    "text.parse_math": False,  # names come from users, and may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH = 3.5  # inches


@dataclass(frozen=True)
class Picture:
    """One SVG with what it shows in words: `title`, `description` for who cannot see it, `caption` below it."""

    key: str
    title: str
    description: str
    caption: str
    svg: str


def logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain labels: matplotlib's own are formulas."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def picture(key: str, title: str, description: str, caption: str, canvas: Canvas) -> Picture:
    """The finished picture of a canvas."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(key, title, description, caption, inline(buffer.getvalue(), key, title, description))
