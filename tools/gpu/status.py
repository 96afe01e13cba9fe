"""What README.md, docs/gpu and docs/will-it-pay.md say of GPUs: that nothing has run, or which pages docs/gpu has.

    python -m tools.gpu.status --write

A page is what the tools beside this one and `tools.gpu.evidence` write. That of a rehearsal is refused.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nxm_export.errors import DataError
from tools import ROOT
from tools.gpu.pages import REHEARSAL
from tools.rendering import table, write_section

PAGES, SECTION = ROOT / "docs/gpu", "tools.gpu.status"
README, INDEX, GAIN = ROOT / "README.md", PAGES / "README.md", ROOT / "docs/will-it-pay.md"
_DATE = re.compile(r"^\| date \| (\d{4}-\d{2}-\d{2})|Written by .* on (\d{4}-\d{2}-\d{2})", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page of docs/gpu: its file name, its title, and the day of its measurement."""

    file: str
    title: str
    date: str


def pages(folder: Path = PAGES) -> list[Page]:
    """The pages of a folder, by date; raises `DataError` for one without title or date, and for a rehearsal."""
    found = []
    for file in sorted(folder.glob("*.md")):
        if file.name == INDEX.name:
            continue
        text = file.read_text(encoding="utf-8")
        title, date = re.match(r"# (.+)", text), _DATE.search(text)
        if title is None or date is None:
            raise DataError(f"{file} has no title or no date; let the tool that measured write it again")
        if REHEARSAL in text:
            raise DataError(f"{file} is of a rehearsal on a CPU, and no evidence of a GPU; remove it")
        found.append(Page(file.name, title[1], date[1] or date[2]))
    return sorted(found, key=lambda page: (page.date, page.file))


def sections(found: Sequence[Page]) -> dict[Path, str]:
    """What each document says, by its path."""
    if not found:
        return {
            README: "**Nothing has run on a GPU yet**, so how much 2:4 gains there is not measured.",
            INDEX: "**There is none yet.** No engine of this project has run on a GPU.",
            GAIN: "On GPUs nothing is measured yet.",
        }
    rows = [[f"[{page.title}]({page.file})", page.date] for page in found]
    return {
        README: f"On GPUs this has run: {_links(found, 'docs/gpu')}. What no page names has not run on one.",
        INDEX: table(rows, ["what ran", "date"], "ll"),
        GAIN: f"Measured on GPUs: {_links(found, 'gpu')}.",
    }


def _links(found: Sequence[Page], folder: str) -> str:
    return ", ".join(f"[{page.title}]({folder}/{page.file}) ({page.date})" for page in found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="put it into the documents")
    write = parser.parse_args(arguments).write
    try:
        made = sections(pages())
    except DataError as error:
        print(f"tools.gpu.status: {error}", file=sys.stderr)
        return 1
    for document, text in made.items():
        print(f"{document.relative_to(ROOT)}: {text}")
        if write:
            write_section(document, SECTION, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
