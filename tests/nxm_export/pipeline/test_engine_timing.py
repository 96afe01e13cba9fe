"""Engine directories are timed at shapes that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nxm_export.contract.io_spec import load_spec
from nxm_export.pipeline import engine_timing


def test_a_bench_without_shapes_stays_within_what_the_model_takes(tiny_engine: Callable[..., Path]) -> None:
    engine = tiny_engine("ort")
    limit = load_spec(engine).max_length
    assert limit < 64, "one of the usual shapes would be refused"
    twice = engine_timing.bench_engines([engine], [(2, 8), (1, 8), (2, 8)], rounds=1)
    assert [(timing.batch, timing.sequence) for timing in twice.timings] == [(2, 8), (1, 8)]
    report = engine_timing.bench_engines([engine], rounds=1)
    assert [(timing.batch, timing.sequence) for timing in report.timings] == [(1, 32), (8, limit)]
