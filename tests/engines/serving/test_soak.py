"""The soak of `tools/benchmarks/soak_load.py`, short; `python -m tools.benchmarks.soak` runs it for as long as you
like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.exact_engine import MAX_LENGTH, expected, feeds_of
from tools.benchmarks.servers import nxm_serve
from tools.benchmarks.soak_load import Load, reloads_done, soak


@pytest.mark.slow
def test_a_soaked_server_loses_nothing_and_keeps_its_size(engine: Path, tmp_path: Path) -> None:
    served = Path(shutil.copytree(engine, tmp_path / "served"))
    feeds = [feeds_of([n, 1 + n // 2], n) for n in range(1, MAX_LENGTH + 1)]
    bodies = [
        json.dumps(
            {
                "inputs": [
                    {"name": k, "datatype": "INT64", "shape": list(v.shape), "data": v.ravel().tolist()}
                    for k, v in f.items()
                ]
            }
        ).encode()
        for f in feeds
    ]
    answers = [expected(f) for f in feeds]
    load = Load(
        "/v2/models/exact/infer", bodies, lambda i, logits: np.array_equal(logits, answers[i]), reload_every=1.0
    )
    arguments = (f"exact={served}", "--watch-seconds", "0.1", "--read-timeout-ms", "500")
    with nxm_serve(tmp_path / "log", *arguments) as server:
        report = soak(server, served, load, seconds=10)
        assert report.problems(memory_growth=16) == [], report
        assert report.right > 500
        assert min(report.aborted, report.garbage, report.stuck) > 0
        reloads = reloads_done(server)
        assert reloads["done"] >= 3
        assert reloads["refused"] == 0
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
