"""Labels or a tokenizer that an engine was not built with, or not compared with: no card of them, and a page that says
so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.parity.reports import PARITY_FILE
from nxm_export.errors import ArtifactError
from nxm_export.reporting import card
from nxm_export.reporting.conclusion import conclude
from nxm_export.reporting.run_facts import read_run
from tests.support import exact_engine
from tests.support.compared_run import ENGINE, compared_run


def other_labels(engine: Path) -> None:
    spec = json.loads((engine / "spec.json").read_text())
    (engine / "spec.json").write_text(json.dumps({**spec, "labels": spec["labels"][::-1]}))


def other_tokenizer(engine: Path) -> None:
    file = engine / "tokenizer.json"
    file.write_text(file.read_text().replace('"good"', '"better"'))


def no_tokenizer(engine: Path) -> None:
    (engine / "tokenizer.json").unlink()


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "labels": (other_labels, "spec.json is not the one that the engine was built with"),
    "tokenizer": (other_tokenizer, "tokenizer.json is not the one that the engine was built with"),
    "gone": (no_tokenizer, "tokenizer.json is missing: the passport beside it names it"),
}
wrong = pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)


@wrong
def test_no_card_of_an_engine_with_other_files_beside_it(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    engine, out = exact_engine.build(tmp_path / "engine", parity=True), tmp_path / "CARD.md"
    assert "**Parity: passed.**" in card(engine, out).read_text(encoding="utf-8")
    out.unlink()
    change(engine)
    with pytest.raises(ArtifactError, match=f"no card of files that contradict each other: {said}"):
        card(engine, out)
    assert not out.exists()


@wrong
def test_a_page_doubts_an_engine_with_other_files_beside_it(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    run = compared_run(tmp_path / "run")
    change(run / ENGINE)
    read = read_run(run)
    assert any(doubt.startswith(f"{ENGINE}/{said}") for doubt in read.doubts)
    assert conclude(read).command is None


def test_a_comparison_with_other_labels_is_not_shown(tmp_path: Path) -> None:
    """The passport agrees with what lies there: the engine was built again, with other labels, and not compared."""
    engine = exact_engine.build(tmp_path / "engine", parity=True)
    other_labels(engine)
    exact_engine.cover(engine)
    said = r"parity.json compared the engine of passport.json with other labels or another tokenizer"
    with pytest.raises(ArtifactError, match=said):
        card(engine, tmp_path / "CARD.md")
    (engine / PARITY_FILE).unlink()
    text = card(engine, tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert "Classes: positive, negative." in text
    assert "it was not compared" in text
