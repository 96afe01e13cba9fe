"""A bench report in its file: read as it was written, refused by field."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.benchmark.latency import LEAST_ROUNDS, SCHEMA, BenchReport, Timing, paired, read_bench_report
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import as_objects, encode

REPORT = BenchReport(
    timings=(
        Timing("dense", 1, 32, 2.0, (1.75, 2.25), 30),
        Timing("sparse", 1, 32, 1.0, (0.5, 1.5), 30, "CUDA events"),
    ),
    ratios=(Speedup("sparse", "dense", 1, 32, 2.0, (1.5, 2.5)),),
    verdict="2:4 pays",
    unmeasured=("elsewhere: no GPU here",),
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(encode(REPORT, SCHEMA))
    assert read_bench_report(tmp_path / "latency.json") == REPORT
    printed = json.dumps(REPORT.to_dict())
    (tmp_path / "latency.json").write_text(printed)  # as `nxm bench --json` prints it
    assert read_bench_report(tmp_path / "latency.json") == REPORT


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": "nxm-bench/2"}, "schema nxm-bench/2 is not the nxm-bench/1 that this version reads"),
        ({"timings": [{"name": "dense"}]}, r"timings\[0\]: Object missing required field `batch`"),
        (
            {"ratios": [{**as_objects(REPORT.to_dict()["ratios"])[0], "interval": [1.0]}]},
            r"ratios\[0\]\.interval: Expected `array`",
        ),
        ({"rounds": 3}, "unknown field rounds"),
    ],
)
def test_a_damaged_one_is_refused_by_file_and_field(change: dict[str, object], complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    file.write_text(json.dumps({**REPORT.to_dict(), **change}))
    with pytest.raises(ArtifactError, match=complaint) as refused:
        read_bench_report(file)
    assert str(refused.value).startswith(str(file))


def test_so_few_rounds_that_chance_alone_agrees_find_no_difference() -> None:
    """Of one round a percentile bootstrap draws the same ratio a thousand times, and any two engines would differ."""
    for rounds in range(1, LEAST_ROUNDS):
        ratio, (low, high) = paired(np.linspace(2, 3, rounds), np.ones(rounds))
        assert low <= 1 <= high
        assert high >= ratio >= 2
    assert paired(np.ones(1), np.full(1, 4.0)) == (0.25, (0.25, 1.0))
    assert paired(np.linspace(2, 3, LEAST_ROUNDS), np.ones(LEAST_ROUNDS))[1][0] > 1
    assert 2 * 0.5**LEAST_ROUNDS < 0.05 < 2 * 0.5 ** (LEAST_ROUNDS - 1)
