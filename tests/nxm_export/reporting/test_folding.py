"""What a page folds: passing probes, rows that are equal, raw dumps. What failed is never folded."""

from __future__ import annotations

from dataclasses import replace

from engines.parity.probes import ProbeResult
from nxm_export.reporting.figures import Shown
from nxm_export.reporting.matrix_tables import matrix_tables
from nxm_export.reporting.page import render
from nxm_export.reporting.parity_tables import parity_tables
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Code, PageTable
from tests.support.html_page import Page
from tests.support.made_runs import engine, made_run, matrix, on_kernels, parity

PASSES = ProbeResult("one token", True, 0.0, 0.01, "against the checkpoint")
FAILS = ProbeResult("extra padding", False, 0.5, 0.01, "padded to 29 tokens")
IDLE = ProbeResult("no room", None, None, None, "too short")


def cell(value: object) -> str:
    if isinstance(value, tuple):
        return "".join(cell(part) for part in value)
    return value.text if isinstance(value, Code | Shown) else str(value)


def rows(table: PageTable) -> list[list[str]]:
    return [[cell(value) for value in row] for row in table.rows]


def probe_tables(*probes: ProbeResult) -> tuple[PageTable, PageTable]:
    tables = [t for t in parity_tables(made_run(engine(compared=parity(probes=probes)))) if "Probes" in t.caption]
    failed, rest = tables
    return failed, rest


def of_matrices(run: Run) -> list[PageTable]:
    return [table for table in matrix_tables(run) if table.rows]


def test_passing_probes_are_folded_with_their_number_and_a_failing_one_is_not() -> None:
    failed, rest = probe_tables(PASSES, FAILS, IDLE)
    assert not failed.folded
    assert [row[1] for row in rows(failed)] == ["extra padding"]
    assert [row[1] for row in rows(rest)] == ["one token", "no room"]
    assert rest.folded.endswith(": 1 of 3 pass, 1 do not apply")
    none_failed, _ = probe_tables(PASSES)
    assert not none_failed.rows


def test_matrices_that_differ_in_their_block_alone_are_one_row_and_all_stand_below() -> None:
    run = replace(made_run(), matrices=tuple(matrix(block, role) for block in range(4) for role in ("query", "key")))
    short, full = of_matrices(run)
    assert not short.folded
    assert [row[:4] for row in rows(short)] == [
        ["encoder.layer.*.query", "0-3", "64x64", "2:4+W8"],
        ["encoder.layer.*.key", "0-3", "64x64", "2:4+W8"],
    ]
    assert rows(short)[0][8] == "12.50% to 17.19%", "1/8 of block 0 and 1/8 + 3/64 of block 3"
    assert full.folded == "All 8 matrices, one by one"
    assert [row[0] for row in rows(full)] == [m.name.removesuffix(".weight") for m in run.matrices]


def test_a_matrix_with_a_problem_or_another_kernel_has_a_row_of_its_own() -> None:
    broken = matrix(2, problems=("row 3 has three of four",))
    run = replace(made_run(), matrices=(matrix(0), matrix(1), broken, matrix(3)))
    short, _ = of_matrices(run)
    assert [(row[0], row[1], row[-1]) for row in rows(short)] == [
        ("encoder.layer.*.query", "0-1, 3", "none"),
        ("encoder.layer.2.query", "2", "row 3 has three of four"),
    ]
    seen = on_kernels(engine("trt"), (True, True, None))
    assert seen.sparsity is not None
    names = [f"encoder.layer.{block}.query.weight" for block in range(3)]
    weights = tuple(replace(w, name=name) for w, name in zip(seen.sparsity.weights, names, strict=True))
    seen = replace(seen, sparsity=replace(seen.sparsity, weights=weights))
    short, *_ = of_matrices(replace(made_run(seen), matrices=(matrix(0), matrix(1), matrix(2))))
    assert [(row[1], row[-2]) for row in rows(short)] == [("0-1", "sparse"), ("2", "unknown (no-gpu)")]


def test_shares_of_zeros_are_a_span_of_two_figures_with_their_places() -> None:
    run = replace(made_run(), matrices=(matrix(0, zeros=0.5), matrix(1, zeros=0.625)))
    short, _ = of_matrices(run)
    assert rows(short)[0][6] == "50.00% to 62.50%"
    span = short.rows[0][6]
    assert isinstance(span, tuple)
    places = [part.figure.pointer for part in span if isinstance(part, Shown)]
    assert places == ["/weights/0/zeros", "/weights/1/zeros"]


def test_matrices_without_equals_are_shown_as_they_are() -> None:
    (only,) = of_matrices(replace(made_run(), matrices=(matrix(0), matrix(0, "key"))))
    assert not only.folded


def test_in_the_page_folded_tables_are_closed_and_failures_are_not_in_them() -> None:
    run = made_run(engine(compared=parity(probes=(PASSES, FAILS))))
    page = Page(render(replace(run, matrices=(matrix(0), matrix(1)), files={"a.json": "0" * 64}), {}))
    folds = page.all("details")
    assert all("open" not in fold.attrs for fold in folds)
    assert len(folds) == len(page.all("summary"))
    folded = "".join(fold.text for fold in folds)
    assert "one token" in folded
    assert "extra padding" not in folded
    assert "what else its parity.json says" in folded
    assert "0" * 64 in folded
    assert "extra padding" in "".join(row.text for row in page.all("tr"))


def test_every_cell_names_its_column_for_narrow_screens() -> None:
    page = Page(render(replace(made_run(engine(compared=parity())), matrices=(matrix(0), matrix(1))), {}))
    assert all(cell.attrs["data-label"] for cell in page.all("td"))
    assert {e.attrs["role"] for e in page.all("table", "tr", "td")} == {"table", "row", "cell"}
