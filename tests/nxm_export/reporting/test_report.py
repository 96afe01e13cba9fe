"""The page and the card of a run: every number is the one of the file that it names, nothing of a user's is markup, nothing
is loaded from elsewhere, and an unfinished or doctored run is said to be one.

One tiny model goes through `nxm run` and `nxm search` for all tests here. Its classes are called what an attacker would
call them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.errors import ArtifactError
from nxm_export.reporting import card, report
from nxm_export.reporting.hub_card import markdown
from nxm_export.reporting.matrices import projection_error
from nxm_export.reporting.page import render
from nxm_export.reporting.run_facts import read_run
from nxm_export.reporting.verdicts import verdicts
from nxm_export.storage.run_dir import RunDir
from tests.support import tiny

pytestmark = pytest.mark.slow  # a whole run is made for them; `make test` makes a page of one in test_readme.py

CLASSES = ("<script>alert(1)</script>", "a \"b\" & 'c' | $x$ </style>")
VOID = {"meta", "link", "br", "img", "input", "hr"}
PICTURES = {"tradeoff", "plan", "sensitivity", "sample", "latency", "parity", "curves"}


@dataclass
class Page(HTMLParser):
    """A parsed page: its elements with attributes and text, and whether tags are balanced."""

    text: str
    elements: list[dict[str, Any]] = field(default_factory=list)
    open: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.text)
        self.close()
        assert not self.open, f"never closed: {[element['tag'] for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] in tags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, traced_once: Callable[[pytest.MonkeyPatch], None]) -> Path:
    """A finished run of a tiny model, read only."""
    from compressors.settings import Settings
    from nxm_export.pipeline.run import Request, run

    home = tmp_path_factory.mktemp("report")
    tiny.write_model("bert", home / "model", head="classification", classes=CLASSES)
    for file in tiny.write_data(home):
        rows = [line.rpartition("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [f"{text}\t{CLASSES[int(label)] if label.isdecimal() else label}" for text, _, label in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = Settings(steps=24, batch_size=16, learning_rate=1e-3, calibration_samples=64, precision="fp32")
    request = Request(
        str(home / "model"),
        "classification",
        str(home / "train.tsv"),
        str(home / "dev.tsv"),
        WeightSpec.parse("2:4+W8"),
        settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        traced_once(patch)
        run(request, home / "run")
    return home / "run"


@pytest.fixture(scope="module")
def searched(finished: Path) -> Path:
    """What `nxm search` found on the dense model of the run."""
    from compressors.search.plan_search import search
    from compressors.search.settings import SearchSettings

    out = finished.parent / "searched"
    settings = SearchSettings(
        candidate_specs=("2:4+W8", "W8", "dense"),
        compression=0.8,
        samples=32,
        held_out=32,
        swaps=1,
        finalists=2,
        pareto=(0.7, 0.75),
    )
    search(
        finished / "dense", task="classification", train=str(finished.parent / "train.tsv"), out=out, settings=settings
    )
    return out


@pytest.fixture(scope="module")
def page(finished: Path, searched: Path) -> Page:
    return Page(report(finished, finished.parent / "page.html", search=searched).read_text(encoding="utf-8"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def bare(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run for tests that put back what they change."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("bare") / "run"))


def follow(data: Any, pointer: str) -> Any:
    """The value at an RFC 6901 pointer."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def leaves(data: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}")
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from leaves(value, f"{pointer}/{number}")
    else:
        yield pointer, data


def test_every_number_of_the_page_is_the_one_of_the_file_that_it_names(page: Page, finished: Path) -> None:
    plan = CompressionPlan.load(finished / "checkpoint" / "nxm_plan.json")
    from_plan = {plan.engine_bytes(sparse=sparse) for sparse in (True, False)}
    seen = page.all("data")
    assert len(seen) > 100
    for element in seen:
        attrs, file = element["attrs"], finished / element["attrs"]["data-file"]
        value = json.loads(attrs["value"])
        if "data-pointer" in attrs:
            assert value == follow(json.loads(file.read_text(encoding="utf-8")), attrs["data-pointer"]), attrs
        elif file.name == "nxm_plan.json":
            assert value in from_plan
        else:
            assert value == file.stat().st_size


def test_every_number_that_nxm_show_prints_is_in_the_page_in_the_same_digits(page: Page, finished: Path) -> None:
    shown = json.loads(CliRunner().invoke(main, ["show", str(finished), "--json"]).stdout)
    printed = CliRunner(env={"COLUMNS": "300"}).invoke(main, ["show", str(finished)]).stdout
    of_summary = {
        e["attrs"]["data-pointer"]: e for e in page.all("data") if e["attrs"]["data-file"] == "summary/summary.json"
    }
    numbers = {
        pointer: value
        for pointer, value in leaves(shown)
        if isinstance(value, (int, float))
        # the shape is in the words around, and whether a pass is a pass is a word of its own
        and not pointer.endswith(("/batch", "/seq", "/sequence", "/passed", "/sparse"))
    }
    assert {pointer: json.loads(of_summary[pointer]["attrs"]["value"]) for pointer in numbers} == numbers
    for pointer in numbers:
        if not pointer.startswith("/training"):  # which `nxm show` does not print
            text = of_summary[pointer]["text"]
            assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", printed), (
                f"{pointer}: {text} is not in `nxm show`"
            )


def test_what_users_wrote_is_text_and_never_markup(page: Page) -> None:
    assert not page.all("script", "iframe", "object", "embed", "form", "base", "img")
    assert {CLASSES[0], CLASSES[1]} <= {element["text"] for element in page.all("code")}
    for element in page.elements:
        for name in element["attrs"]:
            assert not name.startswith("on"), f"<{element['tag']} {name}>"
            assert name != "style", "an inline style is refused by the policy of the page"


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(page: Page) -> None:
    (policy,) = [
        e["attrs"]["content"] for e in page.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"
    ]
    (style,) = page.all("style")
    assert page.text.index("Content-Security-Policy") < page.text.index("<style>"), "a policy holds for what follows it"
    digest = base64.b64encode(hashlib.sha256(style["text"].encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]


def test_the_page_asks_no_network_for_anything(page: Page) -> None:
    for element in page.elements:
        for name, value in element["attrs"].items():
            if name in ("href", "src", "srcset", "xlink:href", "action", "poster", "data"):
                assert str(value).startswith(("#", "data:")), f"<{element['tag']} {name}={value!r}>"


def test_every_picture_is_there_and_says_what_it_shows(page: Page) -> None:
    drawn = {e["attrs"]["id"].removeprefix("picture-") for e in page.all("figure")}
    assert drawn == PICTURES
    ids = {e["attrs"]["id"]: e for e in page.elements if "id" in e["attrs"]}
    assert len(page.all("svg")) == len(PICTURES)
    for svg in page.all("svg"):
        assert svg["attrs"]["role"] == "img"
        names = [ids[name] for name in svg["attrs"]["aria-labelledby"].split()]
        assert [name["tag"] for name in names] == ["title", "desc"]
        assert all(len(name["text"]) > 5 for name in names)
    assert len(page.all("figcaption")) == len(PICTURES)


def test_the_page_can_be_read_without_eyes_or_a_mouse(page: Page) -> None:
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids)), "ids are unique"
    targets = [e["attrs"]["href"][1:] for e in page.all("a", "use") if e["attrs"]["href"].startswith("#")]
    labels = [name for e in page.elements for name in e["attrs"].get("aria-labelledby", "").split()]
    assert set(targets) | set(labels) <= set(ids)
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("header", "main", "nav", "footer", "h1")] == [1] * 5
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3", "h4")]
    assert all(after <= before + 1 for before, after in pairwise(levels)), "no level is skipped"
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all(e["attrs"].get("scope") in ("col", "row") for e in page.all("th"))
    scrolled = [e for e in page.all("div") if e["attrs"].get("class") == "scroll"]
    assert len(scrolled) == len(page.all("table")), "a wide table scrolls, and by keyboard, too"
    assert all(e["attrs"]["tabindex"] == "0" and e["attrs"]["aria-label"] for e in scrolled)


def test_every_matrix_of_the_plan_has_a_row(page: Page, finished: Path) -> None:
    plan = CompressionPlan.load(finished / "checkpoint" / "nxm_plan.json")
    rows = {e["text"] for e in page.all("th") if e["attrs"].get("scope") == "row"}
    assert {name.removesuffix(".weight") for name in plan.weights} <= rows


def test_a_search_gives_the_map_its_measured_sensitivity(page: Page, finished: Path, tmp_path: Path) -> None:
    assert "Measured sensitivity by layer and matrix" in page.text
    alone = report(finished, tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "Projection error by layer and matrix" in alone
    assert "nxm search" in alone, "the command that measures it"


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    first, second = (report(finished, tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert first == second


@pytest.mark.parametrize("spec", ["2:4+W8", "1:4", "W4", "4:8+W3", "dense"])
def test_the_projection_error_is_that_of_the_nearest_matrix_by_enumeration(spec: str) -> None:
    wanted, weight = WeightSpec.parse(spec), np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    lost = 0.0
    for row in weight.astype(float):
        kept = row.copy()
        if wanted.pattern:
            n, m = wanted.pattern.n, wanted.pattern.m
            for start in range(0, 8, m):
                group = row[start : start + m]
                best = max(combinations(range(m), n), key=lambda places: sum(group[p] ** 2 for p in places))
                kept[start : start + m] = [group[p] if p in best else 0.0 for p in range(m)]
        if wanted.qmax:
            step = max(abs(kept)) / wanted.qmax
            grid = [code * step for code in range(-wanted.qmax, wanted.qmax + 1)]
            kept = np.array([min(grid, key=lambda point: abs(point - value)) for value in kept])
        lost += float(((row - kept) ** 2).sum())
    # both are sums of 24 squares in float64, in different orders
    assert projection_error(weight, wanted) == pytest.approx(lost / float((weight.astype(float) ** 2).sum()), rel=1e-12)


# Unfinished, doctored and foreign runs


@pytest.mark.parametrize(
    ("left", "missing", "drawn"),
    [
        (("dense",), "the compressed model and its plan", set()),
        (("dense", "checkpoint"), "the graphs", {"curves", "plan", "sensitivity", "sample", "tradeoff"}),
        (("dense", "checkpoint", "onnx"), "the engines", {"curves", "plan", "sensitivity", "sample", "tradeoff"}),
        (("dense", "checkpoint", "onnx", "engines", "compare"), "latency", PICTURES - {"latency"}),
        (("dense", "checkpoint", "onnx", "engines", "compare", "bench"), "the paired interval", PICTURES),
    ],
)
def test_an_unfinished_run_is_shown_as_far_as_it_got(
    copied: Path, left: tuple[str, ...], missing: str, drawn: set[str]
) -> None:
    for stage in {path.name for path in copied.iterdir() if path.is_dir()} - set(left):
        shutil.rmtree(copied / stage)
    if "compare" not in left:
        for file in copied.glob("engines/*/parity.json"):
            file.unlink()
    made = Page(report(copied).read_text(encoding="utf-8"))
    gaps = [e["text"] for e in made.all("li") if "strong" in e["text"] or "nxm run" in e["text"]]
    assert any(text.startswith(missing) and "nxm run" in text for text in gaps), gaps
    assert {e["attrs"]["id"].removeprefix("picture-") for e in made.all("figure")} == drawn


def test_a_run_with_nothing_in_it_and_a_directory_that_is_none_are_refused(tmp_path: Path) -> None:
    RunDir(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="nothing has been made in this run yet; run the same `nxm run`"):
        report(tmp_path / "empty")
    with pytest.raises(ArtifactError, match=r"not a run directory \(no manifest.json\)"):
        report(tmp_path)
    assert not list(tmp_path.glob("**/*.html")), "nothing half-written"


def test_a_number_that_was_changed_afterwards_is_told(copied: Path, tmp_path: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    file.write_text(re.sub(r'"engine_value": [\d.]+', '"engine_value": 0.999', file.read_text()))
    text = report(copied).read_text(encoding="utf-8")
    assert "Do not trust this page yet" in text
    assert "compare/ort-cpu-int8/parity.json is not the file that its stage wrote" in text
    assert "says 0.999; run the same command again to bring the summary up to date" in text
    with pytest.raises(ArtifactError, match="no card of files that contradict each other"):
        card(copied, tmp_path / "README.md")
    assert not (tmp_path / "README.md").exists()


def test_a_summary_has_the_worst_of_several_outputs(copied: Path) -> None:
    """As question answering has them: a start and an end."""
    file, summary = copied / "compare" / "ort-cpu-int8" / "parity.json", copied / "summary" / "summary.json"
    said, short = json.loads(file.read_text()), json.loads(summary.read_text())
    (first,) = said["outputs"]
    second = {**first, "output": "end", "max_abs": 2 * first["max_abs"], "agreement": 0.875}
    file.write_text(json.dumps({**said, "outputs": [first, second]}))
    short["parity"]["ort-cpu-int8"] |= {"max_abs": second["max_abs"], "agreement": 0.875}
    summary.write_text(json.dumps(short))
    run = read_run(copied)
    assert not [doubt for doubt in run.doubts if " says " in doubt]
    made = Page(report(copied).read_text(encoding="utf-8"))
    found = [e for e in made.all("data") if str(e["attrs"]["data-file"]).endswith("int8/parity.json")]
    shown = {e["attrs"].get("data-pointer"): e["attrs"]["value"] for e in found}
    assert [float(shown[f"/outputs/{i}/max_abs"]) for i in (0, 1)] == [first["max_abs"], second["max_abs"]]


def test_what_has_no_interval_is_shown_without(copied: Path, tmp_path: Path) -> None:
    file = copied / "summary" / "summary.json"
    said = {**json.loads(file.read_text(encoding="utf-8")), "difference_interval": [None, None], "dense": None}
    file.write_text(json.dumps(said), encoding="utf-8")
    done = CliRunner().invoke(main, ["show", str(copied)])
    assert done.exit_code == 0
    assert "no interval" in done.stdout
    assert "NaN" in done.stdout
    assert report(copied, out=tmp_path / "page.html").is_file()


def test_a_comparison_of_another_engine_is_not_shown(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    file.write_text(re.sub(r'"engine_sha256": "\w+"', f'"engine_sha256": "{"0" * 64}"', file.read_text()))
    (copied / "engines" / "ort-cpu-int8" / "parity.json").write_text(file.read_text())
    (engine,) = [engine for engine in read_run(copied).engines if engine.name == "ort-cpu-int8"]
    assert engine.parity is None
    assert "compared another engine" in report(copied).read_text(encoding="utf-8")


def test_an_engine_that_was_swapped_is_told(copied: Path) -> None:
    file = copied / "engines" / "ort-cpu-int8" / "model.onnx"
    file.write_bytes(file.read_bytes() + b"x")
    assert any("is not the engine of its passport" in doubt for doubt in read_run(copied).doubts)


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[]", b'{"schema": "nxm-summary/9"}'])
def test_a_damaged_file_is_told_and_the_rest_shown(copied: Path, damage: bytes) -> None:
    (copied / "summary" / "summary.json").write_bytes(damage)
    run = read_run(copied)
    assert run.summary is None
    assert any(doubt.startswith("summary/summary.json") for doubt in run.doubts)
    assert Page(report(copied).read_text(encoding="utf-8")).all("figure")


@pytest.mark.parametrize("value", [None, "x", [], {"a": 1}, -3, True], ids=str)
@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("summary/summary.json", ["compression", "hw"]),
        ("summary/summary.json", ["speedup", 0, "interval"]),
        ("compare/ort-cpu-int8/parity.json", ["outputs"]),
        ("bench/latency.json", ["timings", 1, "quartiles"]),
        ("engines/ort-cpu-int8/passport.json", ["device"]),
        ("onnx/cpu/verify.json", ["weights", 0]),
        ("checkpoint/metrics.json", ["value"]),
        ("onnx/dense/spec.json", ["labels"]),
        ("manifest.json", ["stages", "dense"]),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_told_and_never_a_traceback(
    bare: Path, file: str, place: list[Any], value: Any
) -> None:
    path = bare / file
    whole = path.read_text(encoding="utf-8")
    data = json.loads(whole)
    holder = follow(data, "".join(f"/{key}" for key in place[:-1]))
    holder[place[-1]] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        with suppress(ArtifactError) if file == "manifest.json" else nullcontext():
            assert render(read_run(bare), {}).endswith("</html>")
    finally:
        path.write_text(whole, encoding="utf-8")


def rewritten(copied: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """The states of the verdicts after a change of the summary."""
    file = copied / "summary" / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    change(summary)
    file.write_text(json.dumps(summary), encoding="utf-8")
    return {verdict.key: verdict.word for verdict in verdicts(read_run(copied))}


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ([-0.04, -0.01], "worse than dense"),
        ([-0.04, 0.0], "not told apart"),
        ([-0.01, 0.02], "not told apart"),
        ([0.01, 0.02], "better than dense"),
        ([None, 0.02], "no interval"),
    ],
)
def test_accuracy_is_judged_by_the_paired_interval(copied: Path, interval: list[float], word: str) -> None:
    assert rewritten(copied, lambda summary: summary.update(difference_interval=interval))["accuracy"] == word


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ([1.2, 1.4], [1.1, 1.3], "faster"),
        ([1.2, 1.4], [0.9, 1.3], "not everywhere"),
        ([0.9, 1.1], [0.8, 0.9], "not told apart"),
        ([0.6, 0.7], [0.8, 0.9], "slower"),
    ],
)
def test_speed_is_judged_at_every_shape(copied: Path, first: list[float], second: list[float], word: str) -> None:
    def change(summary: dict[str, Any]) -> None:
        for ratio in summary["speedup"]:
            ratio["interval"] = first if ratio["batch"] == 1 else second

    assert rewritten(copied, change)["speed"] == word


def test_sparsity_is_not_claimed_without_a_kernel_that_proves_it(finished: Path, copied: Path) -> None:
    (found,) = [verdict for verdict in verdicts(read_run(finished)) if verdict.key == "sparse"]
    assert found.word == "stored; running unknown"
    file = copied / "onnx" / "trt" / "verify.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"pattern": "2:4"', '"pattern": null', 1))
    (found,) = [verdict for verdict in verdicts(read_run(copied)) if verdict.key == "sparse"]
    assert found.word == "pattern broken"


def test_a_failed_comparison_makes_the_verdict_fail(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"passed": true', '"passed": false'), encoding="utf-8")
    (found,) = [verdict for verdict in verdicts(read_run(copied)) if verdict.key == "parity"]
    assert (found.state, found.word) == ("bad", "failed")


def test_errors_by_block_and_what_else_a_comparison_says_are_shown(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    blocks: list[dict[str, Any]] = [
        {
            "block": f"layer.{i} <b>",
            "accumulated_max_abs": 10.0 ** (i - 6),
            "accumulated_max_tolerance": 1e-3,
            "isolated_max_abs": 2e-7,
            "passed": True,
        }
        for i in range(4)
    ]
    blocks[2] |= {"passed": False, "isolated_max_abs": 0.03125, "isolated_max_tolerance": 0.0078125}
    bisected = {"schema": "nxm-bisect/2", "engine_sha256": said["engine_sha256"], "blocks": blocks}
    (copied / "compare" / "ort-cpu-int8" / "bisect.json").write_text(json.dumps(bisected))
    gate = {"gate": "drop<=0.5", "actual": 0.75, "limit": 0.5, "passed": False, "reason": "points <below>"}
    left_out = {"name": "no room", "actual": None, "tolerated": None, "passed": None, "reason": "too short"}
    pair = {"other": "elsewhere", "other_sha256": "0" * 64, "output": "logits", "max_abs": 0.5, "mean_abs": 0.25}
    more = {"gates": [gate], "more": {"said": 0.125}, "pairs": [pair], "secondary_metrics": {"mcc": [0.75, 0.5]}}
    file.write_text(json.dumps({**said, **more, "probes": [*said["probes"], left_out]}), encoding="utf-8")
    made = Page(report(copied).read_text(encoding="utf-8"))
    assert "picture-blocks" in {e["attrs"].get("id") for e in made.all("figure")}
    found = {e["attrs"].get("data-pointer"): e["text"] for e in made.all("data")}
    assert found["/blocks/3/max_abs"] == "0.001"
    assert float(found["/gates/0/found"]) == 0.75
    assert found["/more/said"] == "0.125"
    place = ("compare/ort-cpu-int8/parity.json", "/probes/1/actual")
    cell = next(e for e in made.all("data") if (e["attrs"]["data-file"], e["attrs"].get("data-pointer")) == place)
    assert float(cell["text"]) == pytest.approx(said["probes"][1]["actual"], rel=0.05)  # two digits are shown
    rows = [row["text"] for row in made.all("tr")]
    assert any("drop<=0.5" in row and "FAIL" in row and "points <below>" in row for row in rows)
    verdicts_of = {True: "pass", None: "does not apply"}
    for probe in [*said["probes"], left_out]:
        assert any(probe["name"] in row and verdicts_of[probe["passed"]] in row for row in rows)
        assert not any(probe["name"] in row and "FAIL" in row for row in rows)
    assert not any(left_out["name"] in row and "NaN" in row for row in rows)
    assert any("elsewhere" in row and "0.5" in row and "0.25" in row for row in rows)
    assert any("mcc" in row and "0.7500" in row and "0.5000" in row for row in rows)
    assert any("layer.2 <b>" in row and "0.031 of 0.0078" in row and "PARTS" in row for row in rows)
    (found,) = [verdict for verdict in verdicts(read_run(copied)) if verdict.key == "parity"]
    assert found.state == "bad"
    assert any("parts from the checkpoint in layer.2 <b>" in str(row.pieces) for row in found.rows)


def test_a_bisection_of_another_engine_is_not_shown(copied: Path) -> None:
    other = {
        "schema": "nxm-bisect/2",
        "engine_sha256": "0" * 64,
        "blocks": [{"block": "layer.0", "accumulated_max_abs": 1.0}],
    }
    (copied / "engines" / "ort-cpu-int8" / "bisect.json").write_text(json.dumps(other))
    run = read_run(copied)
    assert not any(engine.blocks for engine in run.engines)
    assert any("bisect.json compared another engine" in doubt for doubt in run.doubts)


# The model card


def front_matter(text: str) -> dict[str, Any]:
    head = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(head, dict)
    return head


def test_the_card_of_a_run_has_its_numbers_and_says_what_it_does_not_know(finished: Path, tmp_path: Path) -> None:
    text = card(finished, tmp_path / "README.md").read_text(encoding="utf-8")
    summary = json.loads((finished / "summary" / "summary.json").read_text(encoding="utf-8"))
    head = front_matter(text)
    assert head["pipeline_tag"] == "text-classification"
    assert head["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": summary["compressed"]}]
    assert "license" not in head, "no file says it"
    low, high = summary["difference_interval"]
    for said in (
        f"| dense | {summary['dense']:.4f} |",
        f"| compressed | {summary['compressed']:.4f} |",
        f"| difference, 95 % paired interval | {low:+.4f} to {high:+.4f} |",
        f"| hw | {summary['compression']['hw']:.2%} |",
    ):
        assert said in text
    dense = json.loads((finished / "dense" / "metrics.json").read_text(encoding="utf-8"))
    parity = json.loads((finished / "compare" / "ort-cpu-int8" / "parity.json").read_text(encoding="utf-8"))
    for name in ("f1", "mcc"):
        assert f"| {name} | {dense[name]:.4f} | {parity['secondary_metrics'][name][1]:.4f} |" in text
    for engine in finished.glob("engines/*/passport.json"):
        assert json.loads(engine.read_text(encoding="utf-8"))["engine_sha256"] in text
    unknown = text.partition("## What this card does not know")[2]
    assert "licence" in unknown
    assert "sparse kernel: no engine proves it" in unknown


def test_the_card_of_an_engine_directory_knows_what_lies_in_it(finished: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(finished / "engines" / "ort-cpu-int8", tmp_path / "engine"))
    text = card(engine, tmp_path / "README.md").read_text(encoding="utf-8")
    parity = json.loads((engine / "parity.json").read_text(encoding="utf-8"))
    assert f"| compressed | {parity['engine_value']:.4f} |" in text
    assert "| dense | not known |" in text
    assert "how far it is from the dense model" in text
    (engine / "parity.json").unlink()
    text = card(engine, tmp_path / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in front_matter(text), "no value without a comparison"
    assert "it was not compared" in text


def test_names_cannot_break_out_of_the_card(finished: Path, tmp_path: Path) -> None:
    text = card(finished, tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert markdown("a|b\n# c [x](y) `d` *e*") == r"a\|b \# c \[x\](y) \`d\` \*e\*"


def test_a_directory_that_is_neither_makes_no_card(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither an engine directory nor a run"):
        card(tmp_path, tmp_path / "README.md")
    assert not (tmp_path / "README.md").exists()


# The commands


def test_the_commands_print_the_path_or_json(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", str(finished), "--out", str(out), "--json"])
    assert json.loads(done.stdout) == {"path": str(out), "bytes": out.stat().st_size}
    done = CliRunner().invoke(main, ["card", str(finished), "--out", str(tmp_path / "README.md")])
    assert done.stdout.strip() == str(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "."], "not a run directory"),
        (["card", ".", "--out", "README.md"], "neither an engine directory nor a run"),
        (["report", "RUN", "--out", "no/such/page.html"], "no: no such directory"),
        (["report", "RUN", "--search", "."], "has no search.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [str(finished) if argument == "RUN" else argument for argument in arguments])
    assert done.exit_code == 1
    assert said.split(": ")[-1] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lacking", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_extra(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == lacking or name.startswith("nxm_export.reporting.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, lacking, None)
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
        f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000", *options, file.as_uri(),
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
    assert {e["attrs"]["id"].removeprefix("picture-") for e in built.all("figure")} == PICTURES
    assert [e["attrs"] for e in built.all("data")] == [e["attrs"] for e in page.all("data")]
    assert not built.all("script")


@needs_browser
def test_chromium_would_complain_about_what_the_policy_refuses(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.text.replace("<h1>", '<h1 style="color: red">'), encoding="utf-8")
    _, messages = visit(file, tmp_path, "--dump-dom")
    assert len(messages) == 1
    assert "Content Security Policy" in messages[0]
