"""The probe of cuSPARSELt: its rehearsal, budget, verdicts, and a GPU that is warm before it is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.cusparselt.fake_capture import FakeCapture
from tools import ROOT
from tools.gpu.cusparselt import __main__ as cusparselt
from tools.gpu.cusparselt import gemms
from tools.gpu.cusparselt.gemms import Gemm
from tools.gpu.cusparselt.timing import Timer


def test_products_and_a_layer_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "out" / "report.json"
    options = ["--rehearse", "--models", "tiny", "--rows", "128", "--out", str(file)]
    child = subprocess.run(
        [sys.executable, "-m", "tools.gpu.cusparselt", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["problems"] == report["skipped"] == []
    assert {gemm["name"] for gemm in report["gemms"]} == {"ffn-up", "ffn-down", "qkv", "proj"}
    for gemm in report["gemms"]:
        assert gemm["failed"] == {}
        assert gemm["deviations"]["int8 2:4, int32"] == gemm["deviations"]["int_mm against float64"] == 0
        assert gemm["deviations"]["int8 2:4, fp16"] < 1e-3  # FP16 rounds to 2^-11
    (layer,) = report["layers"]
    assert layer["errors"]["int8 2:4, int32 against int8"] == 0
    assert layer["errors"]["int8 against fp16"] < 0.05
    assert "tiny ffn-up 128 512 128: " in child.stdout
    page = (file.parent / "stand-in-products.md").read_text(encoding="utf-8")
    assert "A rehearsal on the CPU: nothing of this is about a GPU." in page
    assert f"| command | `python3 -m tools.gpu.cusparselt {' '.join(options)}` |" in page
    assert "| tiny qkv | 128x384 | 128 | no verdict: at M 128 " in page, "the host's clock says nothing of a device"


def test_the_budget_ends_the_measuring_and_what_was_not_reached_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rehearse", "--models", "tiny", "--rows", "128", "--budget", "0"]
    assert cusparselt.main([*options, "--out", str(tmp_path / "x.json")]) == 1
    assert "not reached: tiny ffn-up 128, " in capsys.readouterr().out


def test_the_most_telling_products_come_first() -> None:
    names = [str(job) for job in cusparselt.jobs(["bert-base", "minilm"], [4096, 128, 1024])]
    assert names[:5] == [f"bert-base {name} 4096" for name in ("ffn-up", "ffn-down", "qkv", "proj", "layer")]
    assert names.index("minilm layer 4096") < names.index("bert-base ffn-up 1024")


def gemm(m: int, dense: float, sparse: float, **facts: Any) -> Gemm:
    """A product that a GPU timed by CUDA graphs, right in every form."""
    ways = {gemms.INT8: dense, gemms.SPARSE: sparse, gemms.FP16: 2 * dense, gemms.SPARSE_F16: sparse / 2}
    given: dict[str, Any] = {
        "microseconds": ways,
        "timed_by": dict.fromkeys(ways, "graph"),
        "deviations": {gemms.SPARSE: 0.0, gemms.SPARSE_F16: 2e-4, "int_mm against float64": 0.0},
    }
    return Gemm("bert", "qkv", m, 96, 32, **(given | facts))


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([gemm(128, 10, 5), gemm(4096, 10, 8)], "from M = 128 on"),
        ([gemm(128, 10, 12), gemm(1024, 10, 8), gemm(4096, 10, 8)], "from M = 1024 on"),
        ([gemm(128, 10, 5), gemm(4096, 10, 9.8)], "no: not at M = 4096"),  # 2 % are no gain
        ([gemm(128, 10, 5), gemm(4096, 10, float("nan"))], "no: not at M = 4096"),
        ([gemm(128, 10, 5), gemm(4096, 10, 5, microseconds={gemms.INT8: 10.0})], "no verdict: at M 4096 "),
        ([gemm(128, 10, 5, deviations={gemms.SPARSE: 1.0, "int_mm against float64": 0.0})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, deviations={gemms.SPARSE: 0.0, "int_mm against float64": 3.0})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, deviations={})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, timed_by={gemms.INT8: "eager", gemms.SPARSE: "graph"})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, timed_by=dict.fromkeys((gemms.INT8, gemms.SPARSE), "eager"))], "no verdict: at M 128 "),
    ],
)
def test_two_four_pays_from_the_rows_on_where_it_is_faster_at_all_that_were_measured(
    measured: list[Gemm], said: str
) -> None:
    (row,) = gemms.verdict_rows(list(reversed(measured)))
    assert row[:3] == ["bert qkv", "32x96", ", ".join(str(each.m) for each in measured)]
    assert row[3].startswith(said)


def test_a_gain_is_told_beside_the_one_over_floats_and_the_one_with_scale_and_bias_inside() -> None:
    assert gemms.verdict_rows([gemm(128, 10, 12), gemm(1024, 10, 8)])[0][4:] == ["1.25x at 1024", "2.50x", "2.50x"]
    wrong = gemm(128, 10, 8, deviations={gemms.SPARSE: 0.0, gemms.SPARSE_F16: 0.5, "int_mm against float64": 0.0})
    assert gemms.verdict_rows([wrong])[0][4:] == ["1.25x at 128", "2.50x", "-"]


def test_a_gpu_that_was_idle_is_warmed_up_before_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a way takes seconds, in which clocks fall: the next time would be of a slow GPU."""
    cuda = FakeCapture(monkeypatch)
    clock = FakeClock()
    monkeypatch.setattr("tools.gpu.cusparselt.timing.time", clock)
    timer = Timer("cuda", 2, 3, [])

    def calls_of_a_time() -> int:
        calls: list[None] = []

        def call() -> None:
            calls.append(None)
            clock.now += 0.01

        timer.time("cublas", [call])
        return len(calls)

    first, second = calls_of_a_time(), calls_of_a_time()
    clock.now += 5.0
    assert calls_of_a_time() == first == second + 30  # 0.3 s of calls of 10 ms
    assert cuda.stream == cuda.OWN


class FakeClock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now
