"""The static site of the documentation: `make site` writes it to build/site. The pages are those that one reads beside
the code; this adds the order (contents.rst), a search, and a dark page. Nothing is loaded from other hosts.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]

project = "nxm-export"
author = "the nxm-export authors"
copyright = f"2026, {author}"
extensions = ["myst_parser"]
root_doc = "site/contents"
html_theme = "furo"
html_title = "nxm-export"
html_show_sphinx = False
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
suppress_warnings = ["myst.header"]  # headings of the changelog's kind may skip a level


def links_within(page: str, docname: str) -> str:
    """The text of a page with links to the site alone. What lies out of docs/, a section of it too, is in the clone:
    its name is shown as code."""
    up = docname.count("/") + 1
    return re.sub(rf"\[([^\]]*)\]\((?:\.\./){{{up}}}([\w./-]+)(?:#[\w-]*)?\)", r"\1 (`\2`)", page)


def point_outside_links_at_the_clone(_: Sphinx, docname: str, source: list[str]) -> None:
    """What Sphinx calls with each page that it has read."""
    source[0] = links_within(source[0], docname)


def copy_pictures(app: Sphinx, error: Exception | None) -> None:
    """Pictures for a light and a dark page are HTML in the pages, which Sphinx does not look into."""
    if error is None:
        shutil.copytree(DOCS / "images", Path(app.outdir) / "images", dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("source-read", point_outside_links_at_the_clone)
    app.connect("build-finished", copy_pictures)
