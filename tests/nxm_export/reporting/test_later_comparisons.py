"""An engine that passed in its run, and failed when somebody compared it later: nothing calls it passed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.admission import gate_state
from engines.parity.bisect_reports import BISECT_FILE
from engines.parity.parts import Part
from engines.parity.reports import PARITY_FILE
from engines.passport import covered_spec, load_passport
from nxm_export.cli import main
from nxm_export.errors import EngineError, ParityError
from nxm_export.pipeline.later_comparisons import summary_now
from nxm_export.reporting import card, report
from nxm_export.reporting.conclusion import conclude
from nxm_export.reporting.run_facts import read_run
from nxm_export.reporting.verdicts import verdicts
from tests.support import exact_engine
from tests.support.compared_run import ENGINE, NAME, compared_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return compared_run(tmp_path / "run")


@pytest.fixture
def failed(run: Path) -> Path:
    exact_engine.write_parity(run / ENGINE, passed=False)
    return run


def shown(run: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["show", str(run), *options])
    assert result.exit_code == 0, result.output
    return result.stdout + result.stderr * (not options)


def test_the_run_itself_passed(run: Path) -> None:
    assert conclude(read_run(run)).command == f"nxm serve {run / ENGINE}"
    assert shown(run).startswith("Passed: ort-cpu-int8 computes")
    assert f"nxm serve {run / ENGINE}" in shown(run)
    summary_now(run).require_passed()


def test_a_report_says_failed_and_where_and_gives_no_command(failed: Path) -> None:
    read = read_run(failed)
    assert not read.doubts
    made = conclude(read)
    assert (made.state, made.command) == ("bad", None)
    place = f"{ENGINE}/{PARITY_FILE}"
    assert made.no_command == f"{NAME} failed the comparison with its checkpoint ({place}): do not serve it."
    (verdict,) = (verdict for verdict in verdicts(read) if verdict.key == "parity")
    assert (verdict.state, verdict.word) == ("bad", "failed")
    assert verdict.rows[0].pieces[0] == "FAIL"
    assert verdict.rows[0].pieces[-1] == f"; failed in {place}"
    page = report(failed).read_text(encoding="utf-8")
    assert f'data-file="{place}" data-pointer="/gates/0/actual"' in page, "the gate that failed is shown"
    assert f'data-file="compare/{NAME}/{PARITY_FILE}"' in page, "and the numbers of the run"


def test_a_card_says_failed_and_where(failed: Path, tmp_path: Path) -> None:
    text = card(failed, tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert "**Parity: failed.**" in text
    assert f"failed in {ENGINE}/{PARITY_FILE}" in text


def test_show_says_failed_and_where_and_does_not_serve(failed: Path) -> None:
    text = shown(failed)
    assert text.startswith(f"FAILED: {NAME} differs from the checkpoint.")
    assert f"See {failed / ENGINE / PARITY_FILE}." in text
    assert "nxm serve" not in text
    told = json.loads(shown(failed, "--json"))
    assert told["parity"][NAME]["passed"] is False
    assert told["parity"][NAME]["value"] == 1.0, "the run's"


def test_what_a_repeated_run_returns_fails_and_names_the_file(failed: Path) -> None:
    with pytest.raises(ParityError, match=rf"parity failed for {NAME}: see {failed / ENGINE / PARITY_FILE}"):
        summary_now(failed).require_passed()


def test_an_engine_that_failed_when_it_ran_has_failed_with_its_reason(run: Path, tmp_path: Path) -> None:
    passport = load_passport(run / ENGINE)
    part = Part(run / ENGINE, passport, covered_spec(run / ENGINE, passport), None)
    part.without_report(EngineError("the accelerator has no memory left"))
    for file in (report(run), card(run, tmp_path / "run.md"), card(run / ENGINE, tmp_path / "engine.md")):
        text = file.read_text(encoding="utf-8")
        assert "parity.json: the accelerator has no memory left" in text, file
        assert "Tolerance: ." not in text
    assert conclude(read_run(run)).command is None
    assert shown(run).startswith("FAILED")


def of_another(engine: Path) -> None:
    exact_engine.write_parity(engine, passed=False)
    told = json.loads((engine / PARITY_FILE).read_text())
    (engine / PARITY_FILE).write_text(json.dumps({**told, "engine_sha256": "3" * 64}))


@pytest.mark.parametrize(
    ("write", "state"),
    [
        (lambda engine: exact_engine.write_parity(engine, passed=True), "passed"),
        (lambda engine: exact_engine.write_parity(engine, passed=False), "failed"),
        (lambda engine: (engine / PARITY_FILE).write_text("{"), "failed"),
        (lambda engine: (engine / PARITY_FILE).unlink(), "unchecked"),
        (of_another, "unchecked"),
        (lambda engine: exact_engine.write_bisect(engine, passed=True), "passed"),
        (lambda engine: exact_engine.write_bisect(engine, passed=False), "failed"),
        (lambda engine: (engine / BISECT_FILE).write_text("{"), "failed"),
    ],
    ids=["passed", "failed", "damaged", "gone", "of another engine", "blocks pass", "a block parts", "damaged blocks"],
)
def test_what_serve_refuses_no_command_tells_to_serve(run: Path, write: Callable[[Path], object], state: str) -> None:
    write(run / ENGINE)
    assert gate_state(run / ENGINE, load_passport(run / ENGINE)) == state
    if state == "failed":
        assert conclude(read_run(run)).command is None
        assert "nxm serve" not in shown(run)
    else:
        assert "nxm serve" in shown(run)


def test_a_run_whose_engine_is_gone_is_still_shown(run: Path) -> None:
    (run / ENGINE / "passport.json").unlink()
    assert shown(run).startswith("Passed")
