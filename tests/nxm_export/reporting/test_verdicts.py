"""Numbers of a page and the words about them: places in files, and words that do not flatter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.benchmark.latency import BenchReport, Timing
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import DenseMetrics
from nxm_export.contract.records.run_summary import ChosenEngine, OneClass, RunSummary
from nxm_export.reporting.engine_facts import EngineEntry
from nxm_export.reporting.figures import Figure, RunFile
from nxm_export.reporting.page import _latency
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.verdicts import (
    compressed_value,
    dev_samples,
    main_engine,
    metric,
    mixed_versions,
    verdicts,
)
from nxm_export.storage.run_dir import StageRecord
from tests.support.made_runs import engine, made_run, matrix, on_kernels, parity
from tests.support.records import PASSPORT, SUMMARY


def words(summary: RunSummary) -> dict[str, str]:
    """The word of every verdict on a run that has a summary and one engine."""
    engine = EngineEntry("ort-cpu-int8", RunFile("passport.json", PASSPORT, {}), None, None, None, None)
    source = RunFile("summary/summary.json", summary, summary.to_dict())
    run = Run(root=Path("run"), stages={}, summary=source, engines=(engine,))
    return {verdict.key: verdict.word for verdict in verdicts(run)}


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((-0.04, -0.01), "worse than dense"),
        ((-0.04, 0.0), "no difference found"),
        ((-0.01, 0.02), "no difference found"),
        ((0.01, 0.02), "better than dense"),
        ((None, 0.02), "no interval"),
    ],
)
def test_accuracy_is_judged_by_the_paired_interval(interval: tuple[float | None, float | None], word: str) -> None:
    assert words(replace(SUMMARY, difference_interval=interval))["accuracy"] == word


@pytest.mark.parametrize(
    ("gain", "interval", "word"),
    [
        ((0.01, 0.2), (-0.01, 0.02), "no difference found"),
        ((0.0, 0.2), (-0.01, 0.02), "dense not shown to beat one class"),
        ((-0.3, -0.1), (-0.01, 0.02), "dense not shown to beat one class"),
        ((-0.1, 0.2), (-0.04, -0.01), "worse than dense"),
        ((-0.1, 0.2), (0.01, 0.02), "better than dense"),
        ((None, None), (-0.01, 0.02), "no difference found"),
    ],
)
def test_no_loss_is_no_praise_where_the_dense_model_is_no_better_than_one_class(
    gain: tuple[float | None, float | None], interval: tuple[float, float], word: str
) -> None:
    summary = replace(SUMMARY, difference_interval=interval, one_class=OneClass("good", 0.7, gain))
    assert words(summary)["accuracy"] == word
    (told,) = (verdict for verdict in verdicts(made_run(summary=summary)) if verdict.key == "accuracy")
    doubted = gain[0] is not None and gain[0] <= 0
    assert ("do not show that the dense model is better than one class" in told.note) is doubted
    other = replace(summary, one_class=OneClass("", 0.7, gain, "one score"))
    assert words(other)["accuracy"] == word.replace("one class", "one score")


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ((1.2, 1.4), (1.1, 1.3), "faster"),
        ((1.2, 1.4), (0.9, 1.3), "faster at some shapes"),
        ((1.2, 1.4), (0.8, 0.9), "faster or slower, by shape"),
        ((0.9, 1.1), (0.9, 1.2), "no difference found"),
        ((0.9, 1.1), (0.8, 0.9), "slower at some shapes"),
        ((0.6, 0.7), (0.8, 0.9), "slower"),
    ],
)
def test_speed_is_judged_at_every_shape(first: tuple[float, float], second: tuple[float, float], word: str) -> None:
    (ratio,) = SUMMARY.speedup
    speedup = (replace(ratio, interval=first), replace(ratio, batch=8, interval=second))
    assert words(replace(SUMMARY, speedup=speedup))["speed"] == word


@pytest.mark.parametrize(
    ("machines", "said"),
    [
        (("another CPU",), "paired rounds, on another CPU."),
        ((None,), "paired rounds; built on a CPU."),  # of a bench of an older version
        (("one", "another"), "paired rounds; built on a CPU."),
        ((), "paired rounds; built on a CPU."),
    ],
)
def test_speed_is_of_the_machine_that_timed_and_not_of_the_one_that_built(
    machines: tuple[str | None, ...], said: str
) -> None:
    engine = EngineEntry("ort-cpu-int8", RunFile("passport.json", PASSPORT, {}), None, None, None, None)
    timing = Timing("ort-cpu-int8", 1, 32, 1.0, (0.9, 1.1), 9)
    reports = [BenchReport((timing,), (), machine=machine) for machine in machines]
    benches = tuple(RunFile("bench/latency.json", report, report.to_dict()) for report in reports)
    source = RunFile("summary/summary.json", SUMMARY, SUMMARY.to_dict())
    run = Run(root=Path("run"), stages={}, summary=source, engines=(engine,), benches=benches)
    (speed,) = (verdict for verdict in verdicts(run) if verdict.key == "speed")
    assert speed.note.endswith(said)


def test_an_engine_that_was_not_compared_is_not_called_the_reference() -> None:
    timings = tuple(Timing(name, 1, 32, 1.0, (0.9, 1.1), 9) for name in ("int8-dense", "int8-sparse"))
    report = BenchReport(timings, (), unmeasured=("int8-sparse against int8-dense at 1x32: unlike",))
    run = Run(root=Path("run"), stages={}, benches=(RunFile("bench/latency.json", report, report.to_dict()),))
    assert [row[-1] for row in _latency(run).rows] == ["reference", "not compared"]


def rows_of(run: Run, key: str) -> dict[str, str]:
    (told,) = (verdict for verdict in verdicts(run) if verdict.key == key)
    text = {row.label: "".join(p if isinstance(p, str) else p.text for p in row.pieces) for row in told.rows}
    assert len(text) == len(told.rows)
    return text


@pytest.mark.parametrize("left", [True, False], ids=["an earlier run left it", "nothing is left of it"])
def test_an_engine_that_could_not_be_built_fails_the_verdict(left: bool) -> None:
    summary = replace(SUMMARY, failed={"openvino-cpu-int8": "it refuses Erf"})
    old = [engine("openvino-cpu-int8", compared=parity())] if left else []
    run = made_run(engine(compared=parity()), *old, summary=summary)
    (verdict,) = (verdict for verdict in verdicts(run) if verdict.key == "parity")
    assert (verdict.state, verdict.word) == ("bad", "failed")
    rows = rows_of(run, "parity")
    assert rows["ort-cpu-int8"].startswith("pass")
    assert rows["openvino-cpu-int8"].startswith("FAIL")
    assert rows["openvino-cpu-int8"].endswith("it refuses Erf")
    (alone,) = (verdict for verdict in verdicts(made_run(summary=summary)) if verdict.key == "parity")
    assert alone.state == "bad", "where no other was compared, too"


def test_every_row_says_its_own_number() -> None:
    chosen = ChosenEngine("ort-cpu-int8", "ort", "a tie")
    entry = replace(engine(compared=parity()), passport=RunFile("passport.json", PASSPORT, {}))
    plan = CompressionPlan("bert", {"a": WeightSpec.parse("2:4+W8")}, {"a": (64, 64)})
    run = replace(made_run(entry, summary=replace(SUMMARY, chosen=chosen)), plan=plan)
    assert rows_of(run, "accuracy") == {
        "dense": "0.7500", "compressed": "0.5000", "difference, 95 % paired": "-0.5000 to +0.0000",
        "measured": "on 64 held-out samples",
    }  # fmt: skip
    size = {
        "stored as tensor cores read 2:4": "80.00% saved", "stored as nxm pack does": "82.00% saved",
        "kept values alone, as papers count": "87.50% saved", "engine file ort-cpu-int8, all of it": "0.0 MB",
        "matrices in an INT8 engine, dense": f"{plan.engine_bytes(sparse=False) / 1e6:.1f} MB",
        "matrices in an INT8 engine, 2:4 kernels": f"{plan.engine_bytes(sparse=True) / 1e6:.1f} MB",
    }  # fmt: skip
    assert rows_of(run, "size") == size
    assert rows_of(run, "speed") == {
        "batch 1 x 32 tokens": "1.50x (1.25 to 1.75)", "backend ort was kept": "a tie",
    }  # fmt: skip
    assert rows_of(run, "parity") == {"ort-cpu-int8": "pass, 100.00% equal argmax"}


def test_kernels_of_matrices_that_were_not_planned_prove_nothing() -> None:
    built = replace(PASSPORT, backend="trt", options={"integer_products": 3, "planned_products": 4})
    entry = on_kernels(engine("trt"), (True, None, False))
    assert entry.sparsity is not None
    unplanned = tuple(replace(row, planned_sparse=False, chosen=True) for row in entry.sparsity.weights)
    sparsity = replace(entry.sparsity, weights=(*entry.sparsity.weights, *unplanned))
    entry = replace(entry, sparsity=sparsity, passport=RunFile("passport.json", built, built.to_dict()))
    plan = CompressionPlan("bert", {"a": WeightSpec.parse("2:4+W8")}, {"a": (64, 64)})
    run = replace(made_run(entry), plan=plan, matrices=(matrix(0),))
    assert rows_of(run, "sparse") == {
        "planned N:M": "1 of 1 matrices",
        "found in the stored numbers": "1 of 1",
        "INT8 matrix products, trt": "3 of 4 planned",
        "runs on sparse kernels, trt": "1 of 3 proved, 1 unknown",
    }


def test_versions_are_mixed_where_two_made_stages_of_one_run() -> None:
    record = StageRecord({}, {}, None, {}, {"torch": "2.11"}, 1.0, ("nxm",))
    run = replace(made_run(), stages={"dense": record, "checkpoint": record})
    assert mixed_versions(run) == []
    other = replace(record, versions={"torch": "2.12"})
    assert mixed_versions(replace(run, stages={"dense": record, "checkpoint": other})) == ["torch"]


def test_without_a_summary_the_main_engine_is_a_compressed_one() -> None:
    dense = replace(PASSPORT, plan=None)
    entries = [engine(name) for name in ("openvino", "ort-cpu-sparse")]
    first = replace(engine("ort-cpu-fp32"), passport=RunFile("passport.json", dense, {}))
    assert main_engine(made_run(first, *entries, summary=None)) == entries[1]
    assert main_engine(made_run(first, entries[0], summary=None)) == entries[0]
    assert main_engine(made_run(first, summary=None)) is None


def test_a_run_without_anything_claims_nothing() -> None:
    run = Run(root=Path("run"), stages={})
    assert {verdict.state for verdict in verdicts(run)} == {"absent"}
    assert metric(run) == "metric"
    assert compressed_value(run) is None


def test_without_a_summary_the_stages_own_files_speak() -> None:
    dense = DenseMetrics(metric="mcc", value=0.5, interval=None, dev_samples=7, steps=3)
    run = Run(root=Path("run"), stages={}, dense=RunFile("dense/metrics.json", dense, dense.to_dict()))
    assert metric(run) == "mcc"
    assert dev_samples(run) == Figure(7, "dense/metrics.json", "/dev_samples")


def test_a_figure_has_the_pointer_to_its_place_in_the_file() -> None:
    source = RunFile("summary/summary.json", SUMMARY, SUMMARY.to_dict())
    assert source.figure("speedup", 0, "interval", 1) == Figure(1.75, source.file, "/speedup/0/interval/1")
    assert source.figure("latency_ms", "ort-cpu-int8 1x32", "median") == Figure(
        0.25, source.file, "/latency_ms/ort-cpu-int8 1x32/median"
    )
    assert source.figure("parity", "no such engine", "passed") is None
    assert source.figure("cosine_to_dense", "mean") is None
    with pytest.raises(AttributeError):
        source.figure("mood")
    with pytest.raises(TypeError, match="/plan is no single value"):
        source.figure("plan")


def test_a_value_that_stands_elsewhere_in_a_former_file_has_no_pointer() -> None:
    former = {**SUMMARY.to_dict(), "dense": 0.25}
    del former["dev_samples"]
    source = RunFile("summary/summary.json", SUMMARY, former)
    assert source.figure("dense") == Figure(0.75, source.file)
    assert source.figure("dev_samples") == Figure(64, source.file)
    assert source.figure("compressed") == Figure(0.5, source.file, "/compressed")


def test_every_value_of_a_file_is_named_by_its_path_and_none_is_left_out() -> None:
    source = RunFile("summary/summary.json", SUMMARY, SUMMARY.to_dict())
    figures = {keys: figure.value for keys, figure in source.figures()}
    assert figures["trt_rtx", "float_products", 0] == "pooler"
    assert figures["training", "recipe"] == "obs"
    assert ("training", "admm_steps") not in figures, "it has none"


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "error", "NaN"),
        (None, "score", "none"),
        (True, "general", "yes"),
        ("unknown", "general", "unknown"),
        (0.5, "share", "50.00%"),
        (3, "general", "3"),
        (2_500_000, "megabytes", "2.5"),
    ],
)
def test_a_figure_is_written_by_its_kind(value: float | str | bool | None, kind: str, text: str) -> None:
    assert Figure(value, "file").shown(kind).text == text
