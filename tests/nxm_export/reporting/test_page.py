"""The page of a run: every number is the one of the file that it names, nothing of a user's is markup, nothing is
loaded from elsewhere, and a browser opens it without complaint."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.contract.plan import CompressionPlan
from nxm_export.reporting import report
from tests.nxm_export.reporting.conftest import CLASSES
from tests.support.html_page import Page, follow, leaves

pytestmark = pytest.mark.slow  # a whole run is made for them; `make test` makes a page of one in test_readme.py
PICTURES = {"difference", "tradeoff", "plan", "sensitivity", "sample", "latency", "parity", "curves"}


def test_every_number_of_the_page_is_the_one_of_the_file_that_it_names(page: Page, finished: Path) -> None:
    plan = CompressionPlan.load(finished / "checkpoint" / "nxm_plan.json")
    from_plan = {plan.engine_bytes(sparse=sparse) for sparse in (True, False)}
    seen = page.all("data")
    assert len(seen) > 100
    for element in seen:
        attrs, file = element.attrs, finished / element.attrs["data-file"]
        value = json.loads(attrs["value"])
        if "data-pointer" in attrs:
            assert value == follow(json.loads(file.read_text(encoding="utf-8")), attrs["data-pointer"]), attrs
        elif file.name == "nxm_plan.json":
            assert value in from_plan
        else:
            assert value == file.stat().st_size


def test_every_number_that_nxm_show_prints_is_in_the_page_in_the_same_digits(page: Page, finished: Path) -> None:
    shown = json.loads(CliRunner().invoke(main, ["show", str(finished), "--json"]).stdout)
    printed = CliRunner(env={"COLUMNS": "300"}).invoke(main, ["show", str(finished), "--all"]).stdout
    of_summary = {
        e.attrs["data-pointer"]: e for e in page.all("data") if e.attrs["data-file"] == "summary/summary.json"
    }
    numbers = {
        pointer: value
        for pointer, value in leaves(shown)
        if isinstance(value, (int, float))
        # the shape is in the words around, whether a pass is a pass is a word of its own, and quartiles only decide
        # whether the machine is called busy
        and not pointer.endswith(("/batch", "/seq", "/sequence", "/passed", "/sparse"))
        and "/quartiles/" not in pointer
    }
    assert {pointer: json.loads(of_summary[pointer].attrs["value"]) for pointer in numbers} == numbers
    for pointer in numbers:
        if not pointer.startswith("/training"):  # which `nxm show` does not print
            text = of_summary[pointer].text
            assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", printed), (
                f"{pointer}: {text} is not in `nxm show`"
            )


def test_what_users_wrote_is_text_and_never_markup(page: Page) -> None:
    assert not page.all("script", "iframe", "object", "embed", "form", "base", "img")
    assert {CLASSES[0], CLASSES[1]} <= {element.text for element in page.all("code")}
    for element in page.elements:
        for name in element.attrs:
            assert not name.startswith("on"), f"<{element.tag} {name}>"
            assert name != "style", "an inline style is refused by the policy of the page"


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(page: Page) -> None:
    (policy,) = [e.attrs["content"] for e in page.all("meta") if e.attrs.get("http-equiv") == "Content-Security-Policy"]
    (style,) = page.all("style")
    assert page.text.index("Content-Security-Policy") < page.text.index("<style>"), "a policy holds for what follows it"
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in style.text
    assert "@import" not in style.text


def test_the_page_asks_no_network_for_anything(page: Page) -> None:
    for element in page.elements:
        for name, value in element.attrs.items():
            if name in ("href", "src", "srcset", "xlink:href", "action", "poster", "data"):
                assert str(value).startswith(("#", "data:")), f"<{element.tag} {name}={value!r}>"


def test_every_picture_is_there_and_says_what_it_shows(page: Page) -> None:
    drawn = {e.attrs["id"].removeprefix("picture-") for e in page.all("figure")}
    assert drawn == PICTURES
    ids = {e.attrs["id"]: e for e in page.elements if "id" in e.attrs}
    assert len(page.all("svg")) == len(PICTURES)
    for svg in page.all("svg"):
        assert svg.attrs["role"] == "img"
        names = [ids[name] for name in svg.attrs["aria-labelledby"].split()]
        assert [name.tag for name in names] == ["title", "desc"]
        assert all(len(name.text) > 5 for name in names)
    assert len(page.all("figcaption")) == len(PICTURES)


def test_the_page_can_be_read_without_eyes_or_a_mouse(page: Page) -> None:
    ids = [e.attrs["id"] for e in page.elements if "id" in e.attrs]
    assert len(ids) == len(set(ids)), "ids are unique"
    targets = [e.attrs["href"][1:] for e in page.all("a", "use") if e.attrs["href"].startswith("#")]
    labels = [name for e in page.elements for name in e.attrs.get("aria-labelledby", "").split()]
    assert set(targets) | set(labels) <= set(ids)
    assert page.all("html")[0].attrs["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("header", "main", "nav", "footer", "h1")] == [1] * 5
    levels = [int(e.tag[1]) for e in page.all("h1", "h2", "h3", "h4")]
    assert all(after <= before + 1 for before, after in pairwise(levels)), "no level is skipped"
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all(e.attrs.get("scope") in ("col", "row") for e in page.all("th"))
    scrolled = [e for e in page.all("div") if e.attrs.get("class") == "scroll"]
    assert len(scrolled) == len(page.all("table")), "a wide table scrolls, and by keyboard, too"
    assert all(e.attrs["tabindex"] == "0" and e.attrs["aria-label"] for e in scrolled)


def test_every_matrix_of_the_plan_has_a_row(page: Page, finished: Path) -> None:
    plan = CompressionPlan.load(finished / "checkpoint" / "nxm_plan.json")
    rows = {e.text for e in page.all("th") if e.attrs.get("scope") == "row"}
    assert {name.removesuffix(".weight") for name in plan.weights} <= rows


def test_a_search_gives_the_map_its_measured_sensitivity(page: Page, finished: Path, tmp_path: Path) -> None:
    assert "Measured sensitivity by layer and matrix" in page.text
    alone = report(finished, tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "Projection error by layer and matrix" in alone
    assert "nxm search" in alone, "the command that measures it"


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    first, second = (report(finished, tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert first == second


# The commands


def test_the_commands_print_the_path_or_json(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", str(finished), "--out", str(out), "--json"])
    assert json.loads(done.stdout) == {"path": str(out), "bytes": out.stat().st_size}
    done = CliRunner().invoke(main, ["card", str(finished), "--out", str(tmp_path / "README.md")])
    assert done.stdout.strip() == str(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "."], "not a run directory"),
        (["card", ".", "--out", "README.md"], "neither a run, a compressed checkpoint nor an engine directory"),
        (["report", "RUN", "--out", "no/such/page.html"], "no: no such directory"),
        (["report", "RUN", "--searched", "."], "has no search.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [str(finished) if argument == "RUN" else argument for argument in arguments])
    assert done.exit_code == 1
    assert message.split(": ")[-1] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_extra(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == library or name.startswith("nxm_export.reporting.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    done = CliRunner().invoke(main, ["report", str(finished), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 1
    assert "pip install 'nxm-export[report]'" in done.stderr
    assert not list(tmp_path.iterdir())


# A real browser


def browser() -> str | None:
    """A Chromium on the path, or playwright's."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    cached = sorted((Path.home() / ".cache" / "ms-playwright").glob("chromium-*/chrome-linux*/chrome"))
    return str(cached[-1]) if cached else None


BROWSER = browser()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH (chromium, chromium-browser, google-chrome) nor playwright's"
)


def visit(file: Path, scratch: Path, *options: str) -> tuple[str, list[str]]:
    """(stdout, console messages) of a headless Chromium on a page."""
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000", *options,
        file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("width", [500, 1300], ids=["narrow", "wide"])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_chromium_opens_the_page_without_complaint(page: Page, tmp_path: Path, theme: str, width: int) -> None:
    from matplotlib.image import imread

    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page.text, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={('dark', 'light').index(theme)}"
    _, messages = visit(file, tmp_path, scheme, f"--window-size={width},1600", f"--screenshot={shot}")
    assert messages == []
    picture = imread(shot)[..., :3]  # (height, width, 3), 0 to 1
    assert picture.shape[1] == width
    paper, ink = np.median(picture), (picture.min() if theme == "light" else picture.max())
    assert (paper > 0.9 and ink < 0.3) if theme == "light" else (paper < 0.2 and ink > 0.8)


@needs_browser
def test_chromium_builds_every_picture_and_runs_nothing(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.text, encoding="utf-8")
    dom, messages = visit(file, tmp_path, "--dump-dom")
    assert messages == []
    built = Page(dom)
    assert {e.attrs["id"].removeprefix("picture-") for e in built.all("figure")} == PICTURES
    assert [e.attrs for e in built.all("data")] == [e.attrs for e in page.all("data")]
    assert not built.all("script")


@needs_browser
def test_chromium_would_complain_about_what_the_policy_refuses(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.text.replace("<h1>", '<h1 style="color: red">'), encoding="utf-8")
    _, messages = visit(file, tmp_path, "--dump-dom")
    assert len(messages) == 1
    assert "Content Security Policy" in messages[0]


WIDER = """<script>
const wide = [...document.querySelectorAll('body *')].filter(
  e => !e.closest('thead, svg, .skip') && e.getBoundingClientRect().right > 391);
document.title = 'wider: ' + wide.map(e => e.tagName + ' ' + e.textContent.slice(0, 40)).join('; ');
</script>"""


@needs_browser
def test_nothing_is_wider_than_a_telephone(page: Page, tmp_path: Path) -> None:
    """All that is folded is opened. Chromium's own windows are 500 px wide at least, so the page is made 390 px wide;
    its policy is taken out for the script that measures."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.text)
    text = text.replace("<details>", "<details open>").replace("</style>", "html { width: 390px; }</style>", 1)
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"{WIDER}</body>"), encoding="utf-8")
    dom, _ = visit(file, tmp_path, "--window-size=500,2000", "--dump-dom")
    assert Page(dom).all("title")[0].text == "wider: "
