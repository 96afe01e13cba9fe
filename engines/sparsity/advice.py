"""Advice per matrix: what to change so that a sparse INT8 kernel can run it, and which matrices are one change away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engines.sparsity.report import ALIGNMENT, TruthReport, judge
from nxm_export.contract.matrix_facts import MatrixFacts

# What a matrix looks like once its advice was followed: it is one fix away when nothing else stands in the way then.
_FIXED: dict[str, Callable[[MatrixFacts], MatrixFacts]] = {
    "axis": lambda fact: replace(fact, sparse_along_k=True),
    "pattern": lambda fact: replace(fact, sparse_along_k=True, broken_groups=0),
    "scales": lambda fact: replace(fact, scales_along_k=False, has_zero_point=False),
    "float-input": lambda fact: replace(fact, integer_input=True),
    "float-output": lambda fact: replace(fact, output="int8"),
    "op-form": lambda fact: replace(fact, form="matmul" if fact.form == "conv1x1" else "conv1x1", output="int8"),
    "alignment": lambda fact: replace(
        fact, k=-(-fact.k // ALIGNMENT) * ALIGNMENT, n=-(-fact.n // ALIGNMENT) * ALIGNMENT
    ),
}
_ADVICE = {
    "axis": "the pruner went along the wrong axis: prune 2:4 along the input channels (K) and fine-tune again",
    "scales": "quantize again with symmetric INT8 (zero point 0) and one scale per output channel",
    "float-input": "quantize its input, too: one QuantizeLinear/DequantizeLinear pair with a static scale",
    "float-output": "quantize its output: a QuantizeLinear/DequantizeLinear pair behind bias and activation, so that INT8 leaves",
    "op-form": "write it in the other form (in nxm: export --lowering conv1x1 or matmul)",
    "alignment": f"pad K and N to multiples of {ALIGNMENT} (with zeros, which change nothing), or keep it dense",
    "no-kernel": "no change to the file helps on this GPU with this TensorRT; keep the dense engine",
    "no-engine": "nothing stands in the way in the file: build it and look (`nxm inspect`)",
}


def advise(facts: Sequence[MatrixFacts], report: TruthReport) -> list[dict[str, Any]]:
    """One entry per matrix that could run sparse: name, what to do, whether that is all it takes, or whether it is ready."""
    found: list[dict[str, Any]] = []

    def fixed(fact: MatrixFacts, reason: str) -> bool:
        after = judge(
            [_FIXED[reason](fact)], None,
            backend=report.backend, version=report.version, compute_capability=report.compute_capability,
        )  # fmt: skip
        return after.weights[0].reason == "no-engine"

    for fact, row in zip(facts, report.weights, strict=True):
        if row.reason == "not-planned":
            continue
        if row.reason == "pattern":
            near = fact.broken_groups * 100 <= fact.groups
            text = (
                f"{fact.broken_groups} of {fact.groups} groups keep more than two: zero the smallest of each again after the last training step"
                if near
                else f"prune it 2:4 along K and fine-tune: {fact.broken_groups} of {fact.groups} groups keep more than two"
            )
            found.append(
                {"name": row.name, "advice": text, "one_fix_away": near and fixed(fact, "pattern"), "ready": False}
            )
        elif row.reason in _ADVICE:
            text = _ADVICE[row.reason]
            if row.reason == "no-engine" and not fact.integer_weight:
                text = "2:4 along K, in float: quantize weight, input and output to INT8, or build it as sparse FP16"
            found.append(
                {
                    "name": row.name,
                    "advice": text,
                    "one_fix_away": row.reason in _FIXED and fixed(fact, row.reason),
                    "ready": row.reason == "no-engine" and fact.integer_weight,
                }
            )
    return found
