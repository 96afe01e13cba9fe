"""The two presets of issue 4694."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.sparsity.build_evidence import LayerInfo
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget, WeightSparsity
from tools.gpu import issue4694


def test_the_forms_of_products_are_counted_by_types_kernel_and_outcome() -> None:
    def weight(node: str, reason: str | None, *, planned_sparse: bool = True) -> WeightSparsity:
        planned = "2:4+W8" if planned_sparse else "W8"
        return WeightSparsity(
            *(node, 64, 64, "MatMul", planned, planned_sparse, "2:4", "2:4", True, True, reason is None),
            *("sp_kernel" if reason is None else None, reason, ""),
            node=node,
        )

    def layer(nodes: tuple[str, ...], output: str, kernel: str) -> LayerInfo:
        return LayerInfo("+".join(nodes), "gemm", ("Int8", "Int8"), ("Int8",), (output,), kernel, nodes)

    target = SparsityTarget("trt", "10.3", "8.0", sparse_flag=True, has_gpu=True)
    weights = (weight("a", "dense-kernel"), weight("b", "dense-kernel"), weight("c", None))
    report = SparsityReport(target, (*weights, weight("d", "no-gpu"), weight("e", None, planned_sparse=False)))
    counted = issue4694.forms(report, [layer(("a", "b"), "Half", "dense"), layer(("c", "e"), "Int8", "sp_kernel")])
    assert issue4694.table({"int8-out": counted}).splitlines()[2:] == [
        "| int8-out | 2 | Int8 | Half | dense | dense-kernel |",
        "| int8-out | 1 | Int8 | Int8 | sp_kernel | sparse |",
        "| int8-out | 1 | ? | ? | ? | no-gpu |",
    ]


@pytest.mark.slow
def test_both_presets_of_issue_4694_are_built_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    out = tmp_path / "table.md"
    options = ["--model", "tiny", "--shape", "2x16", "--level", "0", "--work", str(tmp_path), "--out", str(out)]
    assert issue4694.main(options) == 0
    rows = [line.split(" | ") for line in out.read_text(encoding="utf-8").splitlines()[2:]]
    assert {row[0] for row in rows} == {"| float-out", "| int8-out"}
    assert sum(int(row[1]) for row in rows) == 2 * 6
    assert {row[2] for row in rows} == {"Int8"}
    assert not any(row[-1].startswith("sparse") for row in rows), "no GPU has chosen a kernel"
    assert out.read_text(encoding="utf-8") in capsys.readouterr().out
