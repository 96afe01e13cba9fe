"""Advice per matrix: what to change so that a sparse INT8 kernel can run it, and which matrices are one change away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engines.sparsity.judgement import FileProblem, judge
from engines.sparsity.sparsity_report import SparsityReport
from nxm_export.contract.records.matrix_facts import MatrixFacts

# What a matrix looks like once its advice was followed: it is one fix away when nothing else stands in the way then.
_FIXED: dict[str, Callable[[MatrixFacts], MatrixFacts]] = {
    "axis": lambda fact: replace(fact, sparse_along_k=True),
    "pattern": lambda fact: replace(fact, sparse_along_k=True, broken_groups=0),
    "k-multiple": lambda fact: replace(fact, k=-(-fact.k // 4) * 4),
    "scales": lambda fact: replace(
        fact,
        scales_along_k=False,
        has_zero_point=False,
        scales_in_blocks=False,
        scale_problems=(),
        sparse_along_k=fact.sparse_along_k or fact.broken_groups_of_codes == 0,
    ),
    "weight-type": lambda fact: replace(fact, codes="INT8", integer_weight=True),
    "float-input": lambda fact: replace(fact, integer_input=True),
    "float-output": lambda fact: replace(fact, output="int8"),
    "activation": lambda fact: replace(fact, epilogue="gelu_tanh"),
    "op-form": lambda fact: replace(fact, form="matmul" if fact.form == "conv1x1" else "conv1x1", output="int8"),
}
_ADVICE = {
    "axis": "the pruner went along the wrong axis: prune 2:4 along the input channels (K) and fine-tune again",
    "scales": "quantize again with symmetric INT8 (zero point 0) and one scale per output channel",
    "float-input": "quantize its input, too: one QuantizeLinear/DequantizeLinear pair with a static scale",
    "float-output": "quantize its output: a QuantizeLinear/DequantizeLinear pair behind bias and activation, so that "
    "INT8 leaves",
    "activation": "compute its GELU by tanh, and train with that (in nxm: compress --gelu tanh)",
    "op-form": "write it in the other form (in nxm: export --lowering conv1x1 or matmul)",
    "empty": "nothing can be done with it",
    "k-multiple": "pad K with zeros, in weight and input, to a multiple of 4, or keep it dense",
    "channels": "pad the input channels with zeros, to a multiple of 4 a group, or keep it dense",
    "depthwise": "keep it dense: no sparse kernel reads one channel",
    "weight-type": "quantize it to INT8, one scale per output channel",
    "refused": "mend what the problems of the file name, first",
    "kernel-unknown": "nobody has looked whether a sparse kernel exists for it here: build it on the GPU, and look",
    "no-kernel": "no change to the file helps on this GPU with this TensorRT; keep the dense engine",
    "no-engine": "nothing stands in the way in the file, and a sparse kernel exists: build it and look (`nxm inspect`)",
}


@dataclass(frozen=True)
class Advice:
    """What to do about one matrix, which the product `node` reads; whether that is all it takes, or whether it is ready
    as it stands."""

    name: str
    advice: str
    one_fix_away: bool
    ready: bool
    node: str = ""


def advise(facts: Sequence[MatrixFacts], report: SparsityReport, problems: Sequence[FileProblem] = ()) -> list[Advice]:
    """One advice per matrix that could run sparse; `report` is that of a graph alone, on the same `facts` and
    `problems`."""
    advice = []
    for fact, weight in zip(facts, report.weights, strict=True):
        reason = weight.reason or ""
        others = [problem for problem in problems if problem.matrix != fact.name]
        away = reason in _FIXED and judge([_FIXED[reason](fact)], None, report.target, problems=others).weights[0].ready
        if reason == "pattern":
            nearly = fact.broken_groups * 100 <= fact.groups
            keep = f"{fact.broken_groups} of {fact.groups} groups keep more than two"
            text = (
                f"{keep}: zero the smallest of each again after the last training step"
                if nearly
                else f"prune it 2:4 along K and fine-tune: {keep}"
            )
            advice.append(Advice(weight.name, text, nearly and away, ready=False, node=weight.node))
        elif reason in _ADVICE:
            text = _ADVICE[reason]
            if reason in ("no-engine", "kernel-unknown") and weight.type != "int8":
                text = "2:4 along K, in float: quantize weight, input and output to INT8, or build it as sparse FP16"
            advice.append(Advice(weight.name, text, away, weight.ready, weight.node))
    return advice
