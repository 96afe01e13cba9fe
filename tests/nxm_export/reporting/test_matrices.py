"""How much a projection loses, without training."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from engines.sparsity.sparsity_report import WeightSparsity
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.verify_report import VerifyReport
from nxm_export.graph.exporter import export
from nxm_export.reporting.figures import RunFile
from nxm_export.reporting.matrices import Matrix, matrices, projection_error
from nxm_export.reporting.matrix_tables import _kernels_of as _kernels
from tests.support import baked


@pytest.mark.parametrize("spec", ["2:4+W8", "1:4", "W4", "4:8+W3", "dense"])
def test_the_projection_error_is_that_of_the_nearest_matrix_by_enumeration(spec: str) -> None:
    planned, weight = WeightSpec.parse(spec), np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    lost = 0.0
    for row in weight.astype(float):
        projected = row.copy()
        if planned.pattern:
            n, m = planned.pattern.n, planned.pattern.m
            for start in range(0, 8, m):
                group = row[start : start + m]
                best = max(combinations(range(m), n), key=lambda places: sum(group[p] ** 2 for p in places))
                projected[start : start + m] = [group[p] if p in best else 0.0 for p in range(m)]
        if planned.qmax:
            scale = max(abs(projected)) / planned.qmax
            grid = [code * scale for code in range(-planned.qmax, planned.qmax + 1)]
            projected = np.array([min(grid, key=lambda point: abs(point - value)) for value in projected])
        lost += float(((row - projected) ** 2).sum())
    # both are sums of 24 squares in float64, in different orders
    assert projection_error(weight, planned) == pytest.approx(
        lost / float((weight.astype(float) ** 2).sum()), rel=1e-12
    )


@pytest.mark.slow
def test_a_fused_matrix_has_one_row_with_what_was_found_of_each_part(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(baked.write_checkpoint("modernbert", tmp_path / "c", placement="inputs"))
    verified = {
        target: _read_as(f"onnx/{target}/verify.json", export(checkpoint.path, tmp_path / target, target=target).report)
        for target in ("cpu", "trt")
    }
    report = verified["trt"].content
    broken = [
        replace(weight, pattern=None, problems=("not 2:4 along K",)) if ".Wqkv.key." in weight.name else weight
        for weight in report.weights
    ]
    verified["trt"] = _read_as("onnx/trt/verify.json", replace(report, weights=tuple(broken)))
    rows = list(matrices(tmp_path, checkpoint, verified, None))
    assert [row.name for row in rows] == list(checkpoint.plan.weights)
    fused, other = rows[0], rows[1]
    assert fused.pattern == {"cpu": "2:4", "trt query": "2:4", "trt key": None, "trt value": "2:4"}
    assert set(fused.stored.values()) == {"INT8"}
    assert fused.zeros.keys() == fused.pattern.keys()
    assert fused.problems == ("not 2:4 along K",)
    assert (other.pattern, other.names) == ({"cpu": "2:4", "trt": "2:4"}, (other.name,))


def test_kernels_of_parts_stand_together_where_they_are_the_same() -> None:
    fused = Matrix(
        "a.Wqkv.weight", 0, "qkv", (6, 4), WeightSpec.parse("2:4+W8"), {}, {}, {}, (), None, None,
        ("a.Wqkv.query.weight", "a.Wqkv.key.weight"),
    )  # fmt: skip
    query, key = (
        WeightSparsity(name, 4, 3, "matmul", "2:4+W8", True, "2:4", "2:4", True, True, None, None, "no-gpu", "")
        for name in fused.parts
    )
    assert _kernels({query.name: query, key.name: key}, fused) == "unknown (no-gpu)"
    query = replace(query, chosen=True, kernel="sparse_gemm", reason=None)
    assert _kernels({query.name: query, key.name: key}, fused) == "query sparse: sparse_gemm, key unknown (no-gpu)"
    assert _kernels({}, fused) == "unknown"


def _read_as(file: str, report: VerifyReport) -> RunFile[VerifyReport]:
    return RunFile(file, report, report.to_dict())
