"""The sparsity report of an engine: the graph's facts of every matrix, what was measured when the engine was built, and
what the profiler saw.

Only a profiled run makes a matrix sparse. Where the build chose a sparse form and nothing was profiled it is unknown,
and a kernel whose name says nothing of sparsity leaves it unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.cusparselt.kernels import DENSE
from engines.cusparselt.products import sizes_of
from engines.cusparselt.profiling import KernelRun, ProfiledRun
from engines.cusparselt.program import Choice, Measurement, Product, Program
from engines.passport import EnginePassport
from engines.sparsity.engine_report import read_weight_facts
from engines.sparsity.judgement import judge
from engines.sparsity.kernel_names import kernel_named
from engines.sparsity.sparsity_report import SparsityReport, WeightSparsity
from nxm_export.contract.records.matrix_facts import MatrixFacts

_OPEN = ("no-engine", "kernel-unknown")  # of a graph alone: nothing in the file stands in the way


def sparsity_report(
    directory: Path, passport: EnginePassport, program: Program, run: ProfiledRun | None
) -> SparsityReport:
    """What is known of every matrix of an engine directory; raises `ArtifactError` without its ``weights.json``."""
    record = read_weight_facts(directory, passport)
    judged = judge(record.facts, None, record.target)
    rows = [_with_engine(weight, fact, program, run) for weight, fact in zip(judged.weights, record.facts, strict=True)]
    counts = Counter(fact.node for fact in record.facts)
    rows = [
        _unknown(row, "ambiguous", f"{counts[row.node]} matrices are of products named {row.node!r}")
        if row.chosen is True and counts[row.node] > 1
        else row
        for row in rows
    ]
    if (untied := passport.untied(directory)) is not None:
        rows = [_unknown(row, "untied", untied) if row.chosen is True else row for row in rows]
    return replace(judged, weights=tuple(rows), unread=record.unread)


def _with_engine(
    weight: WeightSparsity, fact: MatrixFacts, program: Program, run: ProfiledRun | None
) -> WeightSparsity:
    product = program.products.get(fact.node)
    if weight.reason not in _OPEN:  # something in the file stands in the way, or sparse was not asked for
        sparse = run is not None and _sparse_kernels(run.products.get(fact.node, ()))
        if sparse:
            return _unknown(weight, "contradiction", "the profiler saw a sparse kernel where none can run")
        return replace(weight, chosen=False)
    if product is None:
        detail = (
            "this engine multiplies INT8 in MatMul and Gemm of one INT8 pair and one INT8 matrix; this runs in float"
        )
        return replace(weight, eligible=False, chosen=False, reason="op-form", detail=detail)
    choices = [choice for choice in program.choices if _is_of(choice, product)]
    if not product.two_four or not choices:
        return _unknown(weight, "contradiction", "2:4 in the graph, and not in the engine")
    weight = replace(weight, saved_ms=_saved_ms(choices, run))
    if all(choice.form == DENSE for choice in choices):
        return _dense(weight, choices)
    return _chosen(weight, fact.node, choices, run)


def _is_of(choice: Choice, product: Product) -> bool:
    return (choice.n, choice.k, choice.output, choice.bias) == sizes_of(product)


def _dense(weight: WeightSparsity, choices: Sequence[Choice]) -> WeightSparsity:
    """Dense at every number of rows: slower, or no sparse form is right here."""
    sparse = [each for choice in choices for each in choice.measured if each.form != DENSE]
    if any(each.microseconds is not None for each in sparse):
        return replace(weight, eligible=True, chosen=False, reason=_why_dense(choices), detail=times(choices))
    problems = " | ".join(dict.fromkeys(f"{each.form}: {each.problem}" for each in sparse))
    return replace(
        weight, eligible=False, chosen=False, reason="no-kernel", detail=f"no sparse form is right here: {problems}"
    )


def _chosen(weight: WeightSparsity, node: str, choices: Sequence[Choice], run: ProfiledRun | None) -> WeightSparsity:
    """Sparse at some number of rows."""
    weight = replace(weight, eligible=True)
    if run is None:
        detail = f"a sparse form was chosen and no run was profiled (`nxm inspect --measure`); {times(choices)}"
        return _unknown(weight, "unknown", detail)
    kernels = run.products.get(node, ())
    names = " | ".join(dict.fromkeys(kernel.name for kernel in kernels)) or None
    weight = replace(weight, kernel=names)
    sparse = _sparse_kernels(kernels)
    if at_rows(choices, run.rows).form == DENSE:
        if sparse:
            return _unknown(weight, "contradiction", "a dense form was chosen, and the profiler saw a sparse kernel")
        reason = _why_dense([at_rows(choices, run.rows)])
        return replace(weight, chosen=False, reason=reason, detail=f"at {run.rows} rows; {times(choices)}")
    if not sparse:
        return _unknown(weight, "unknown", f"no kernel of its run has a name that says sparse INT8; {times(choices)}")
    if run.replayed == ():
        return _unknown(weight, "unknown", f"the profiler saw no kernel of the CUDA graph; {times(choices)}")
    if run.replayed is not None and not set(sparse) & set(run.replayed):
        return _unknown(weight, "contradiction", "a sparse kernel runs step by step, and not in the CUDA graph")
    return replace(weight, chosen=True, reason=None, detail=f"profiled at {run.rows} rows; {times(choices)}")


def _why_dense(choices: Sequence[Choice]) -> str:
    """Whether the kernels of the dense product are faster, or the host's launches of the sparse one took the time."""
    pairs = [(dense_form(choice), sparse_form(choice)) for choice in choices]
    launched = [dense.in_graph and not sparse.in_graph for dense, sparse in pairs if dense and sparse]
    return "no-graph" if launched and all(launched) else "dense-faster"


def _unknown(weight: WeightSparsity, reason: str, detail: str) -> WeightSparsity:
    return replace(weight, chosen=None, reason=reason, detail=detail)


def _sparse_kernels(kernels: Sequence[KernelRun]) -> list[str]:
    """The names that say a sparse product of integers."""
    return [run.name for run in kernels if (named := kernel_named(run.name)) and named.sparse and named.integer]


def at_rows(choices: Sequence[Choice], rows: int) -> Choice:
    """The choice that decides at a number of rows."""
    ordered = sorted(choices, key=lambda choice: choice.rows)
    return next((choice for choice in ordered if rows <= choice.rows), ordered[-1])


def times(choices: Sequence[Choice]) -> str:
    """Both times at every number of rows, in words."""
    parts = []
    for choice in sorted(choices, key=lambda choice: choice.rows):
        dense = dense_form(choice)
        shown = f": sparse {in_words(sparse_form(choice), ' us')}, dense {in_words(dense, ' us')}" if dense else ""
        parts.append(f"{choice.rows} rows{shown}")
    return "; ".join(parts)


def in_words(measured: Measurement | None, unit: str = "") -> str:
    """The microseconds of a form, and whether the host's launches are in them, which are in no replayed CUDA graph."""
    if measured is None or measured.microseconds is None:
        return "none is right"
    return f"{measured.microseconds:.1f}{unit}{'' if measured.in_graph else ' (launched one by one)'}"


def dense_form(choice: Choice) -> Measurement | None:
    """The dense form."""
    return next((each for each in choice.measured if each.form == DENSE), None)


def sparse_form(choice: Choice) -> Measurement | None:
    """The fastest sparse form that is right, None where none is."""
    right = [each for each in choice.measured if each.form != DENSE and each.microseconds is not None]
    return min(right, key=lambda each: each.microseconds or 0.0, default=None)


def _saved_ms(choices: Sequence[Choice], run: ProfiledRun | None) -> float | None:
    """What the chosen form saves against the dense one, at the profiled number of rows or at the most; None where one
    of the two alone is of a CUDA graph, since the difference is then the host's."""
    choice = at_rows(choices, run.rows if run is not None else max(choice.rows for choice in choices))
    dense = dense_form(choice)
    mine = next((each for each in choice.measured if each.form == choice.form), None)
    if dense is None or mine is None or dense.in_graph is not mine.in_graph:
        return None
    if dense.microseconds is None or mine.microseconds is None:
        return None
    return (dense.microseconds - mine.microseconds) / 1e3
