"""What people see: tables of results, and JSON for machines in their place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.benchmark.latency import BenchReport, Timing
from engines.sparsity.advice import Advice
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget, WeightSparsity
from nxm_export.cli.engine_tables import print_latency, print_machine
from nxm_export.cli.output import show_result
from nxm_export.cli.run_tables import print_compression, print_search, print_summary
from nxm_export.cli.sparsity_tables import print_diagnosis
from nxm_export.cli.tables import busy_note, print_facts, print_table
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, DistanceToDense, Scores, TrainingFacts
from nxm_export.contract.records.run_summary import OneClass
from nxm_export.contract.records.search_result import (
    FullRun,
    PlanScore,
    SampleCounts,
    SearchBudget,
    SearchCost,
    SearchResult,
)
from nxm_export.contract.records.speedup import Speedup
from nxm_export.pipeline.environment import report
from nxm_export.pipeline.file_diagnosis import FileDiagnosis
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
    result = SearchResult(
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
    print_search(result, Path("found"), everything=False)
    printed = lines(capsys)
    assert "swapped 0.25 87.50% 88.00% 90.00% 1.5 2 x 2:4+W8, 1 x dense" in printed
    assert "and 1 more, tied or at other compressions: --all, or found/search.json" in printed
    assert "greedy" not in " ".join(printed)
    print_search(result, Path("found"), everything=True)
    printed = lines(capsys)
    assert "swapped 0.25 87.50% 88.00% 90.00% 1.5 2 x 2:4+W8, 1 x dense" in printed
    assert "sensitivity: greedy 0.25 87.50% 88.00% 90.00% 2.5 2 x 2:4+W8, 1 x dense" in printed
    assert printed[-2:] == [
        "The search took 3 seconds, an unknown part (resumed) of a compression run",
        "(100 steps, about 40 seconds here).",
    ]


def test_a_compression_says_what_it_did_and_no_hash(capsys: Capture) -> None:
    scores = Scores(metric="accuracy", value=0.8, interval=None, dev_samples=9, secondary_metrics={"mcc": 0.61449})
    facts = TrainingFacts(
        recipe="obs", steps=120, train_samples=800, held_out_samples=80, qat_steps=120, mask_hash="abc",
        outputs_in_float={f"bert.encoder.layer.{n}.output.dense.weight": 0.01 for n in (1, 2)},
    )  # fmt: skip
    metrics = CompressionMetrics.of(
        scores, facts, DistanceToDense(), embedding_table_drop=0.5, embedding_table_drop_interval=None
    )
    print_compression("made", metrics, "new")
    assert lines(capsys)[4:-1] == [
        "mcc 0.6145",
        "recipe obs",
        "head fine-tuned first",
        "training steps 120",
        "training samples 800",
        "kept for checks 80",
        "outputs in float L1-2 output",
        "the INT8 table costs 0.50 points",
    ]


def test_a_machine_is_a_screen_with_the_versions_of_all_packages_under_all(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    machine = report()
    print_machine(machine.to_dict(), everything=False)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 25 - 5, "the verdict and the next command stand around it"
    assert max(map(len, shown.splitlines())) <= 80
    assert "transformers 5" not in shown
    print_machine(machine.to_dict(), everything=True)
    assert "transformers 5" in capsys.readouterr().out


def test_latency_names_the_clock_and_what_was_not_measured(capsys: Capture) -> None:
    timings = (
        Timing("a", 1, 32, 2.0, (1.9, 2.9), 5, p95=2.5, p99=2.75),
        Timing("b", 1, 32, 1.0, (0.9, 1.4), 5, p95=1.25, p99=1.5),
    )
    ratios = (Speedup("b", "a", 1, 32, 1.75, (1.5, 2.5)),)
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


def test_latency_of_queues_and_of_launches_is_named(capsys: Capture) -> None:
    timings = tuple(
        replace(Timing(name, 8, 32, 2.0, (1.9, 2.1), 6, "CUDA events", 2.0, 2.0, 1.6), launches_graph=graph)
        for name, graph in (("a", True), ("b", False))
    )
    print_latency(BenchReport(timings, (), unmeasured=("b against a at 8x32: unlike",)))
    printed = lines(capsys)
    assert printed[0] == "No comparison: b against a at 8x32: unlike."
    assert "a 2 2 2 5000 reference" in printed
    assert "b 2 2 2 5000 not compared" in printed
    assert printed[-4:] == [
        "clock: CUDA events",
        "sentences/s: of runs in a queue, each launched before the last has ended",
        "launched kernel by kernel, not as a CUDA graph: b",
        "not measured: b against a at 8x32: unlike",
    ]


# Milliseconds of 20 rounds of two engines at 8x48 and 32x48 tokens, one thread, as `engines.benchmark.latency` took
# them on two cores: with priority over all other work, and beside 14 other processes.
RECORDED = {
    "idle": [
        [  # ort-cpu-fp32, 8x48
            0.5996, 0.4711, 0.4774, 0.4666, 0.495, 0.4986, 0.4597, 0.4642, 0.4681, 0.4782,
            0.466, 0.5437, 0.4669, 0.4721, 0.4699, 0.467, 0.4599, 0.4734, 0.4655, 0.4705,
        ],
        [  # ort-cpu-int8, 8x48
            0.4277, 0.4179, 0.4317, 0.4247, 0.4213, 0.4149, 0.4222, 0.421, 0.445, 0.4259,
            0.4186, 0.4216, 0.4222, 0.4239, 0.4619, 0.4223, 0.4235, 0.4239, 0.4446, 0.4273,
        ],
        [  # ort-cpu-fp32, 32x48
            1.8135, 1.802, 1.8482, 1.8492, 1.9279, 1.8266, 1.7866, 1.7915, 1.7792, 2.1293,
            1.8347, 1.862, 1.7838, 1.975, 1.8149, 1.865, 1.9006, 1.8995, 1.7955, 1.7426,
        ],
        [  # ort-cpu-int8, 32x48
            1.6152, 1.6982, 1.5836, 1.6149, 1.614, 1.6327, 1.5894, 1.647, 1.6688, 1.615,
            1.568, 1.6015, 1.8635, 1.6974, 1.586, 1.6596, 1.6326, 1.5685, 1.5962, 1.589,
        ],
    ],
    "busy": [
        [  # ort-cpu-fp32, 8x48
            0.7288, 0.8817, 0.7311, 0.8038, 0.7921, 0.7588, 0.7537, 0.7322, 0.6752, 0.508,
            0.7904, 0.6901, 0.7164, 0.7275, 0.7241, 0.7102, 0.6654, 0.73, 0.6575, 0.7648,
        ],
        [  # ort-cpu-int8, 8x48
            0.6648, 0.7025, 0.6924, 0.6538, 0.7036, 0.6982, 0.6718, 0.6687, 0.4747, 0.6803,
            0.6555, 0.7634, 0.8237, 0.6457, 0.4691, 0.6267, 0.4983, 0.6192, 0.7489, 0.6867,
        ],
        [  # ort-cpu-fp32, 32x48
            2.004, 18.4948, 2.0041, 1.9686, 38.1788, 1.9561, 1.9477, 30.0632, 2.0317, 2.0513,
            2.1892, 2.1851, 2.0368, 2.1958, 23.7293, 30.8206, 2.0289, 46.295, 2.0939, 12.5134,
        ],
        [  # ort-cpu-int8, 32x48
            27.0902, 1.7714, 1.7671, 1.8451, 1.7618, 1.8139, 2.0075, 13.2492, 1.8099, 2.0002,
            2.0002, 1.8041, 28.0868, 20.4974, 28.2894, 1.9275, 1.881, 38.1921, 1.845, 18.1478,
        ],
    ],
}  # fmt: skip


def test_a_machine_is_called_busy_where_rounds_differ_and_not_where_they_do_not() -> None:
    """One timing that is wide is chance; the intervals of ratios stayed below 1.2 on the busy machine."""
    quartiles = {
        state: [(float(low), float(high)) for low, high in np.percentile(rounds, [25, 75], axis=1).T]
        for state, rounds in RECORDED.items()
    }
    assert busy_note(quartiles["idle"]) == ""
    assert busy_note([*quartiles["idle"], quartiles["busy"][-1]]) == ""
    assert "busy" in busy_note(quartiles["busy"])
    assert busy_note([]) == ""


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
    printed = capsys.readouterr().out
    assert printed.startswith("FAILED: ort-cpu-int8 differs from the checkpoint.")
    assert "See compare/ort-cpu-int8/parity.json." in printed.splitlines()
    blind = replace(SUMMARY, one_class=OneClass("very good", 0.7, (-0.01, 0.1)))
    print_summary(blind)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    printed = " ".join(printed.split())
    assert "But dense is not shown to beat one class for all (0.7000)." in printed
    assert "no model: one class for all 0.7000 'very good'" in printed
    print_summary(replace(SUMMARY, one_class=OneClass("", 0.7, (-0.01, 0.1), "one score")))
    printed = " ".join(capsys.readouterr().out.split())
    assert "not shown to beat one score for all (0.7000)." in printed
    assert "no model: one score for all 0.7000 dense -0.0100 to +0.1000 from it" in printed
    print_summary(replace(SUMMARY, one_class=OneClass("very good", 0.7, (0.01, 0.1))))
    assert "not shown" not in capsys.readouterr().out
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
