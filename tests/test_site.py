"""The pages as `make site` reads them: no link leads out of docs/. Sphinx would refuse it; it is not installed here."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT

CONF = runpy.run_path(str(ROOT / "docs" / "site" / "conf.py"))
links_within = CONF["links_within"]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def links(text: str) -> list[tuple[str, str]]:
    """File and section of each link that is not an address; code is left out, as Markdown does."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    return [
        (file, section)
        for file, section in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)
        if "://" not in file and "mailto:" not in file
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_site_has_what_its_pages_link_to(page: Path) -> None:
    name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
    for file, section in links(links_within(page.read_text(encoding="utf-8"), name)):
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT / "docs"), f"{page.name} links to {file}, which the site does not hold"
        if section:
            levels = "#" * CONF["myst_heading_anchors"]
            titles = re.findall(rf"^#{{1,{len(levels)}}} (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
            assert section in names, f"{page.name} links to {file}#{section}; headings below {levels} have no anchor"


WORDS = st.text("abcdefgh ", min_size=1, max_size=12)
OUTSIDE = st.tuples(
    st.sampled_from(["README.md", "results", "SECURITY.md", "tools/gpu/README.md"]),
    st.sampled_from(["", "#a-section", "#x"]),
)


@given(
    st.lists(st.tuples(WORDS, OUTSIDE), max_size=4),
    st.sampled_from(["page", "folder/page", "folder/inner/page"]),
    st.sampled_from(["[in](page.md)", "[in](page.md#there)", "[out](https://a.b/c#d)"]),
)
def test_outside_links_become_names_and_others_stay(
    outside: list[tuple[str, tuple[str, str]]], name: str, kept: str
) -> None:
    above = "../" * name.count("/")
    kept += f" [up]({above}tensorrt.md)"
    page = kept + "".join(f" [{text}]({above}../{file}{section})" for text, (file, section) in outside)
    expected = kept + "".join(f" {text} (`{file}`)" for text, (file, _) in outside)
    assert links_within(page, name) == expected
