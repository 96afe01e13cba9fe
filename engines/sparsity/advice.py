"""Advice per matrix: what to change so that a sparse INT8 kernel can run it, and which matrices are one change away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engines.sparsity.report import ALIGNMENT, SparsityReport, judge
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
    "float-output": "quantize its output: a QuantizeLinear/DequantizeLinear pair behind bias and activation, so that "
    "INT8 leaves",
    "op-form": "write it in the other form (in nxm: export --lowering conv1x1 or matmul)",
    "alignment": f"pad K and N to multiples of {ALIGNMENT} (with zeros, which change nothing), or keep it dense",
    "no-kernel": "no change to the file helps on this GPU with this TensorRT; keep the dense engine",
    "no-engine": "nothing stands in the way in the file: build it and look (`nxm inspect`)",
}


@dataclass(frozen=True)
class Advice:
    """What to do about one matrix; whether that is all it takes, or whether it is ready as it stands."""

    name: str
    advice: str
    one_fix_away: bool
    ready: bool


def advise(facts: Sequence[MatrixFacts], report: SparsityReport) -> list[Advice]:
    """One advice per matrix that could run sparse; `report` is that of a graph alone, on the same `facts`."""

    def fixed(fact: MatrixFacts, reason: str) -> bool:
        return judge([_FIXED[reason](fact)], None, report.target).weights[0].reason == "no-engine"

    advice = []
    for fact, weight in zip(facts, report.weights, strict=True):
        reason = weight.reason
        if reason == "pattern":
            nearly = fact.broken_groups * 100 <= fact.groups
            keep = f"{fact.broken_groups} of {fact.groups} groups keep more than two"
            text = (
                f"{keep}: zero the smallest of each again after the last training step"
                if nearly
                else f"prune it 2:4 along K and fine-tune: {keep}"
            )
            advice.append(Advice(weight.name, text, nearly and fixed(fact, reason), ready=False))
        elif reason in _ADVICE:
            text = _ADVICE[reason]
            if reason == "no-engine" and not fact.integer_weight:
                text = "2:4 along K, in float: quantize weight, input and output to INT8, or build it as sparse FP16"
            ready = reason == "no-engine" and fact.integer_weight
            advice.append(Advice(weight.name, text, reason in _FIXED and fixed(fact, reason), ready))
    return advice
