"""What people see: tables of results, and JSON for machines in their place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engines.benchmark.latency import BenchReport, Ratio, Timing
from engines.sparsity.advice import Advice
from engines.sparsity.judgement import SparsityReport, SparsityTarget, WeightSparsity
from nxm_export.cli.engine_tables import print_latency
from nxm_export.cli.output import show_result
from nxm_export.cli.run_tables import print_search, print_summary
from nxm_export.cli.sparsity_tables import print_diagnosis
from nxm_export.cli.tables import print_facts, print_table
from nxm_export.contract.records.search_result import (
    FullRun,
    PlanScore,
    SampleCounts,
    SearchBudget,
    SearchCost,
    SearchResult,
)
from nxm_export.pipeline.inspection import FileDiagnosis
from tests.support.records import SUMMARY

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are not broken."""
    monkeypatch.setenv("COLUMNS", "300")


def lines(capsys: Capture) -> list[str]:
    """What was printed, each line with single spaces."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_columns_of_numbers_stand_to_the_right(capsys: Capture) -> None:
    print_table("two", ("name", "ms"), [("a", 1.23456), ("bb", 100.0)])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[-3:-1] == [" a      1.235", " bb       100"]


def test_markup_in_a_cell_is_text(capsys: Capture) -> None:
    print_table("[red]", ("[bold]",), [("[link=x]y",)])
    assert {"[red]", "[bold]", "[link=x]y"} <= set(lines(capsys))


def test_nested_facts_are_named_by_path(capsys: Capture) -> None:
    print_facts("made", {"plan": {"options": {"2:4": 3}}, "names": ["a", "b"], "none": None})
    assert {"plan.options.2:4 3", "names a, b", "none"} <= set(lines(capsys))


def test_json_is_printed_in_place_of_tables_and_by_the_first_process_alone(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    show_result(lambda: {"a": (1, 2)}, True, lambda: shown.append("table"))
    assert json.loads(capsys.readouterr().out) == {"a": [1, 2]}
    assert not shown
    show_result(dict, False, lambda: shown.append("table"))
    assert shown == ["table"]
    monkeypatch.setenv("RANK", "1")
    show_result(dict, True, lambda: shown.append("table"))
    show_result(dict, False, lambda: shown.append("table"))
    assert capsys.readouterr().out == ""
    assert shown == ["table"]


def test_a_run_says_what_it_keeps_and_what_is_missing(capsys: Capture) -> None:
    print_summary(SUMMARY, everything=True)
    printed = lines(capsys)
    assert "dense, FP32 0.7500" in printed
    assert "compressed, ONNX Runtime 0.5000 to dense: -0.5000 to +0.0000 (paired 95 %)" in printed
    assert "ort-cpu-int8 1x32 0.25 1.50x (paired 1.25 to 1.75)" in printed
    assert "INT8 matrix products 11 of 12 planned" in printed
    assert "run here no GPU" in printed


def test_a_search_names_ties_and_says_what_it_cost(capsys: Capture) -> None:
    def plan(origin: str, milliseconds: float | None) -> PlanScore:
        return PlanScore(
            origin=origin, predicted=0.1, joint=0.25, hw=0.875, packed=0.88, values=0.9,
            options={"2:4+W8": 2, "dense": 1}, milliseconds=milliseconds,
        )  # fmt: skip

    best = plan("swapped", 1.5)
    print_search(
        SearchResult(
            method="nxm",
            budget=SearchBudget("hw", 0.875, None, None),
            best=best,
            finalists=(best,),
            rounds=(),
            plans_evaluated=3,
            samples=SampleCounts(8, 8),
            seed=0,
            cost=SearchCost({"all": 3.0}, FullRun(100, 40.0), resumed=True, share_of_full_run=None),
            tied={"sensitivity": plan("greedy", 2.5)},
        )
    )
    printed = lines(capsys)
    assert "swapped 0.25 87.50% 88.00% 90.00% 1.5 2 x 2:4+W8, 1 x dense" in printed
    assert "sensitivity: greedy 0.25 87.50% 88.00% 90.00% 2.5 2 x 2:4+W8, 1 x dense" in printed
    assert any(
        line.startswith("that is an unknown part (resumed) of a compression run of 100 steps") for line in printed
    )


def test_latency_names_the_clock_and_what_was_not_measured(capsys: Capture) -> None:
    timings = (
        Timing("a", 1, 32, 2.0, (1.9, 2.1), 5, p95=2.5, p99=2.75),
        Timing("b", 1, 32, 1.0, (0.9, 1.1), 5, p95=1.25, p99=1.5),
    )
    ratios = (Ratio("b", "a", 1, 32, 1.75, (1.5, 2.5)),)
    print_latency(BenchReport(timings, ratios, verdict="2:4 pays", unmeasured=("c: no GPU",)))
    printed = lines(capsys)
    assert printed[0] == "2:4 pays"
    assert "a 2 2.5 2.75 500 reference" in printed
    assert "b 1 1.25 1.5 1000 2.00x (paired 1.50 to 2.50)" in printed, "the ratio is that of the medians beside it"
    assert printed[-3:] == [
        "clock: wall clock",
        "the machine was busy: time again when it is idle",
        "not measured: c: no GPU",
    ]


def test_a_quiet_machine_is_not_called_busy(capsys: Capture) -> None:
    timings = (Timing("a", 1, 32, 2.0, (1.9, 2.1), 5), Timing("b", 1, 32, 1.0, (0.9, 1.1), 5))
    print_latency(BenchReport(timings, (Ratio("b", "a", 1, 32, 2.0, (1.98, 2.02)),)))
    assert "busy" not in capsys.readouterr().out


def test_a_run_begins_with_its_verdict_and_ends_with_what_to_type(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(SUMMARY)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) <= 24
    assert max(map(len, captured.out.splitlines())) <= 80
    differing = [name for name, parity in SUMMARY.parity.items() if not parity.passed]
    assert captured.out.startswith("FAILED" if differing or SUMMARY.failed else "Passed")
    failed = replace(SUMMARY, parity={"ort-cpu-int8": replace(SUMMARY.parity["ort-cpu-int8"], passed=False)})
    print_summary(failed)
    assert capsys.readouterr().out.startswith("FAILED: ort-cpu-int8 differs from the checkpoint.")
    print_summary(replace(SUMMARY, parity={}, failed={}))
    assert capsys.readouterr().out.startswith("Nothing proven")


def test_a_diagnosis_gives_every_matrix_a_row_its_reason_and_advice(capsys: Capture) -> None:
    matrix = WeightSparsity(
        name="up.weight", k=64, n=32, form="matmul", planned="2:4+W8", planned_sparse=True, pattern_float="2:4",
        pattern_int8=None, sparse_along_k=True, eligible=None, chosen=False, kernel=None, reason="axis",
        detail="along N",
    )  # fmt: skip
    report = SparsityReport(SparsityTarget("trt", "8.6", "8.0"), (matrix,))
    advice = Advice("up.weight", "prune along K", one_fix_away=True, ready=False)
    print_diagnosis(FileDiagnosis("file.onnx", report, (advice,), ()), everything=True)
    printed = lines(capsys)
    assert "up 64x32 matmul 2:4+W8 2:4 > dense unknown no - - axis" in printed
    assert "axis: along N" in printed
    assert "up yes prune along K" in printed
