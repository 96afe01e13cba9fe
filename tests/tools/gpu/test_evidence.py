"""The page of evidence from a GPU says what its results say: kernels, latencies, the aim, and what failed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from engines.benchmark.latency import BenchReport, Timing
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import EngineError, ParityError
from nxm_export.pipeline.sparsity_twins import BuiltTwins
from tools.gpu import evidence
from tools.gpu.evidence import DENSE, FP16, SPARSE, Forced, Parity, Plan, Result, Sparsity, Variant, kept_at, write_page

DEVICE = {"gpu": "NVIDIA H100 X", "compute_capability": "9.0", "driver": "580.1", "cuda": "13.0"}


def bench(verdict: str, *shapes: tuple[int, int, float, float, float]) -> BenchReport:
    """Medians of FP16, dense and sparse INT8 at each (batch, sequence)."""
    timings, ratios = [], []
    for batch, sequence, *times in shapes:
        for name, median in zip((FP16, DENSE, SPARSE), times, strict=True):
            timings.append(Timing(name, batch, sequence, median, (median, median), 3))
        ratios.append(Speedup(SPARSE, DENSE, batch, sequence, times[1] / times[2], (1.2, 1.4)))
    return BenchReport(tuple(timings), tuple(ratios), verdict)


LARGE = Result(
    Variant("bert-large", "attention", "tanh", "conv1x1"),
    [(128, 384), (1, 128)],
    build_seconds=12.5,
    sparsity=Sparsity(2, 1, 0.5, {"sparse": 1, "float-output": 1, "not-planned": 3}),
    parity={SPARSE: Parity(True, 0.1, 0.2), DENSE: Parity(False, 0.3, 0.2)},
    bench=bench("sparse wins", (128, 384, 9.5, 5.25, 4.0), (1, 128, 1.0, 0.9, 0.95)),
)
FAILED = Result(Variant("minilm", "inputs", "erf", "matmul"), [(1, 128)], error="a | pipe\nand a line")
DENSE_ONLY = Result(
    Variant("minilm", "attention", "tanh", "matmul"),
    [(1, 128)],
    build_seconds=3.0,
    sparsity=Sparsity(1, 0, 0.0, {"sparse": 0}),
    parity={SPARSE: Parity(True, 0.1, 0.2)},
    bench=bench("no difference", (1, 128, 1.0, 0.9, 0.95)),
    forced=Forced(error="no such kernel | here"),
)


def page(tmp_path: Path, *results: Result) -> str:
    return write_page(tmp_path, DEVICE, "8.6.0", results).read_text(encoding="utf-8")


def test_the_page_holds_every_result_losing_ones_too(tmp_path: Path) -> None:
    text = page(tmp_path, LARGE, FAILED, DENSE_ONLY)
    assert text.startswith("# NVIDIA H100 X, TensorRT 8.6.0\n\nCompute capability 9.0, driver 580.1, CUDA 13.0, ")
    for line in (
        f"| {LARGE.variant.name} | 1 / 2 | 50.0% | 1 float-output | int8-sparse: pass, int8-dense: FAIL | 12.5 |",
        "| minilm-inputs-erf-matmul | - | - | error: a \\| pipe and a line | - | - |",
        "| minilm-attention-tanh-matmul | 0 / 1 | 0.0% | - | int8-sparse: pass | 3.0 |",
        "| bert-large-attention-tanh-conv1x1 | 128x384 | 9.5000 | 5.2500 | 4.0000 | 1.31 (1.20 to 1.40) | 2.38 |",
        "- minilm-attention-tanh-matmul: no difference",
        "- minilm-attention-tanh-matmul: error: no such kernel \\| here",
    ):
        assert line in text.splitlines(), line
    assert {file.name for file in (tmp_path / "nvidia-h100-x-8.6.0").iterdir()} == {
        f"{result.variant.name}.json" for result in (LARGE, FAILED, DENSE_ONLY)
    }


def test_a_result_is_kept_by_all_that_it_depends_on(tmp_path: Path) -> None:
    plan = Plan([(1, 8), (4, 32)], 6, 4, tmp_path, weakly_typed=False)
    plans = [plan, replace(plan, rounds=7), replace(plan, level=3), replace(plan, shapes=[(1, 8)])]
    assert len({kept_at(each, "8.6", "Fake A100", LARGE.variant) for each in plans}) == len(plans)
    assert kept_at(replace(plan), "8.6", "Fake A100", LARGE.variant) == kept_at(plan, "8.6", "Fake A100", LARGE.variant)


@pytest.mark.parametrize(
    ("sparse", "verdict"),
    [
        (4.0, " Reached: 1.31x and 2.38x, with bert-large-attention-tanh-conv1x1."),
        (5.0, " Missed: 1.05x and 1.90x, with "),
    ],
)
def test_the_aim_is_reached_or_missed(tmp_path: Path, sparse: float, verdict: str) -> None:
    variant = LARGE.variant
    parity = {SPARSE: Parity(True, 0.1, 0.2), DENSE: Parity(True, 0.1, 0.2)}
    result = Result(variant, [(128, 384)], sparsity=LARGE.sparsity, bench=bench("x", (128, 384, 9.5, 5.25, sparse)))
    result = replace(result, parity=parity)
    aim = next(line for line in page(tmp_path, result).splitlines() if line.startswith("Aim: "))
    assert verdict in aim
    unlike = BenchReport(result.bench.timings, ()) if result.bench else None  # one of the twins has no CUDA graph
    for nothing in (
        DENSE_ONLY,
        replace(result, sparsity=Sparsity(2, 0, 0.0, {})),
        replace(result, sparsity=None),
        replace(result, parity=LARGE.parity),
        replace(result, parity=None),
        replace(result, bench=unlike),
    ):
        assert page(tmp_path, nothing).count("Not shown here: ") == 1


def test_a_step_that_fails_leaves_what_the_others_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = bench("no verdict", (1, 8, 1.0, 0.9, 0.95))
    fewer = replace(times, timings=times.timings[1:])  # the float twin could not be built
    built = BuiltTwins("trt", {}, {FP16: "Calibration failure"})
    monkeypatch.setattr(evidence, "one_shot", lambda *_: tmp_path)
    monkeypatch.setattr("nxm_export.pipeline.sparsity_twins.build_twins", lambda *_: built)
    monkeypatch.setattr(evidence, "_measured", MagicMock(side_effect=EngineError("no inspector")))
    monkeypatch.setattr(evidence, "parity", MagicMock(side_effect=ParityError("NaN")))
    monkeypatch.setattr("nxm_export.pipeline.engine_timing.bench_engines", lambda *_: fewer)
    plan = Plan([(1, 8)], 6, 4, tmp_path, weakly_typed=True)
    result = evidence.measure(Variant("tiny", "attention", "tanh", "matmul"), plan)
    assert (result.error, result.bench) == ("fp16 could not be built: Calibration failure", fewer)
    text = page(tmp_path, result)
    assert "| tiny-attention-tanh-matmul | 1x8 | - | 0.9000 | 0.9500 | 0.95 (1.20 to 1.40) | - |" in text
    assert "| error: fp16 could not be built: Calibration failure |" in text
