"""Markdown from templates (``*.md.j2``, Jinja): numbers are computed in Python, text stands in the template beside the
tool.

A template has the filters ``form`` (a number in a format of Python's, ``{{ share | form(".0%") }}``) and ``table``
(rows of cells under a head, ``{{ rows | table(["engine", "ms"]) }}``), and fails on a name that it was not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nxm_export.storage.atomic import write_atomic
from tools import ROOT


def render(template: str, **data: object) -> str:
    """The text of ``tools/TEMPLATE`` (as in ``benchmarks/cpu.md.j2``) with `data`, without white space at its ends."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "tools"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {"form": format, "table": table}
    return environment.get_template(template).render(**data).strip()


def table(rows: Sequence[Sequence[str]], head: Sequence[str], align: str = "") -> str:
    """A Markdown table, without a newline at its end.

    `align` has a letter for each column, ``l`` or ``r``; by default the first column is left-aligned, the others right.
    """
    marks = {"l": "---", "r": "---:"}
    rule = [marks[letter] for letter in align or "l" + "r" * (len(head) - 1)]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def write_section(document: Path, tool: str, text: str) -> None:
    """Replace what stands between this tool's markers in the document."""
    begin, end = f"<!-- {tool}: begin -->", f"<!-- {tool}: end -->"
    before, opened, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise RuntimeError(f"{document} has no section between {begin} and {end}")
    write_atomic(document, f"{before}{begin}\n{text}\n{end}{after}")


def read_section(document: Path, tool: str) -> str:
    """What stands between this tool's markers in the document."""
    begin, end = f"<!-- {tool}: begin -->\n", f"\n<!-- {tool}: end -->"
    return document.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
