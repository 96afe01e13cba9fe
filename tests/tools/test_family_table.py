"""The table of docs/families.md says what became of the tests, and has a column for every family."""

from __future__ import annotations

import random
from pathlib import Path

from nxm_export.contract.families import FAMILIES
from tests.end_to_end.test_family_stages import STAGES
from tools.family_table import BEGIN, END, PAGE, read_results, render_table, stages_in_order

NAME = "test_a_family_passes_a_stage"
RESULTS = f"""<testsuites><testsuite>
<testcase name="{NAME}[mpnet-sr-ste]"><skipped type="pytest.xfail" message="x"/></testcase>
<testcase name="{NAME}[xlm-roberta-ort]"><failure message="x"/></testcase>
<testcase name="{NAME}[xlm-roberta-sr-ste]"/>
<testcase name="{NAME}[mpnet-trt_rtx]"><skipped type="pytest.skip" message="x"/></testcase>
<testcase name="test_another"/>
</testsuite></testsuites>"""


def test_outcomes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(RESULTS, encoding="utf-8")
    results = read_results(tmp_path / "results.xml")
    assert results == {
        ("xlm-roberta", "sr-ste"): "tested",
        ("xlm-roberta", "ort"): "FAILS",
        ("mpnet", "sr-ste"): "refused",
        ("mpnet", "trt_rtx"): "not here",
    }
    lines = render_table(results).splitlines()
    assert lines[0] == "| stage | xlm-roberta | mpnet |"
    assert lines[2] == "| sr-ste | tested | refused |"
    assert lines[3] == "| ort | FAILS | not run |"


def test_rows_and_columns_come_in_one_order_however_the_tests_ran() -> None:
    assert stages_in_order() == list(STAGES)
    results = {(family, stage): "tested" for family in FAMILIES for stage in STAGES}
    expected = render_table(results)
    shuffled = dict(random.Random(0).sample(sorted(results.items()), len(results)))
    assert list(shuffled) != list(results)
    assert render_table(shuffled) == expected
    assert [row.split(" | ")[0].strip("| ") for row in expected.splitlines()[2:]] == list(STAGES)


def test_the_page_has_every_family_and_stage_and_no_failure() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page[page.index(BEGIN) : page.index(END)].splitlines()[1:]]
    assert rows[0] == ["stage", *FAMILIES]
    assert [row[0] for row in rows[2:]] == list(STAGES)
    assert {cell for row in rows[2:] for cell in row[1:]} <= {"tested", "refused"}
