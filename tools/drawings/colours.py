"""The colours of drawings on a light and on a dark page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colours:
    """Of a page: text, lines, what is proved, what is typed."""

    background: str
    box: str
    line: str
    text: str
    muted: str
    command: str
    proof: str


THEMES = {
    "light": Colours("#ffffff", "#f6f8fa", "#57606a", "#1f2328", "#59636e", "#0550ae", "#1a7f37"),
    "dark": Colours("#0d1117", "#161b22", "#8b949e", "#e6edf3", "#9198a1", "#79c0ff", "#56d364"),
}
