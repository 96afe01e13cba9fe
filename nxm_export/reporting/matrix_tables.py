"""The tables of the weight matrices: equal rows as one, every matrix by itself, and why one is not known to run
sparse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from nxm_export.contract.block_ranges import ranges
from nxm_export.contract.plan import NMPattern
from nxm_export.errors import PlanError
from nxm_export.reporting.figures import Figure
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Cell, Code, PageTable, or_dash, pair

if TYPE_CHECKING:
    from engines.sparsity.sparsity_report import WeightSparsity


def matrix_tables(run: Run) -> Iterator[PageTable]:
    """All of them; the first one is not folded."""
    groups = _equal_rows(run)
    columns = _columns(run)
    if len(groups) == len(run.matrices):
        yield PageTable(_TITLE, columns, [_row(run, [matrix], matrix.name) for matrix in run.matrices])
    else:
        yield PageTable(
            f"{_TITLE}; equal rows of several blocks as one",
            ("matrix", "#blocks", *columns[1:]),
            [
                (head, ranges((m.block for m in rows if m.block is not None), ", ") or "-", *cells)
                for name, rows in groups
                for head, *cells in [_row(run, rows, name)]
            ],
        )
        every = [_row(run, [matrix], matrix.name) for matrix in run.matrices]
        yield PageTable(_TITLE, columns, every, folded=f"All {len(every)} matrices, one by one")
    yield _reasons(run)


_TITLE = "Every matrix: planned, and found on the stored numbers of the graphs"


def _equal_rows(run: Run) -> list[tuple[str, list[Matrix]]]:
    """(name with a star for the block, matrices) of those that differ in nothing but their block, shares of zeros and
    errors. A matrix with a problem is equal to those with the same problem alone."""
    groups: dict[tuple[str, ...], list[Matrix]] = {}
    for matrix in run.matrices:
        block = rf"\.{matrix.block}\."
        name = matrix.name if matrix.block is None else re.sub(block, ".*.", matrix.name, count=1)
        key = (name, *map(str, (matrix.shape, matrix.spec, dict(matrix.stored), dict(matrix.pattern))))
        groups.setdefault((*key, *_kernels(run, matrix), *matrix.problems), []).append(matrix)
    return [(rows[0].name if len(rows) == 1 else key[0], rows) for key, rows in groups.items()]


def _columns(run: Run) -> tuple[str, ...]:
    error = "#sensitivity" if _measured(run) else "#projection error"
    kernels = (f"kernel, {engine.name}" for engine in run.engines if engine.matrices)
    head = ("matrix", "#out x in", "planned", "stored as", "N:M found", "#zeros", "2:4 along K", error)
    return (*head, *kernels, "problems")


def _measured(run: Run) -> bool:
    return any(matrix.sensitivity is not None for matrix in run.matrices)


def _row(run: Run, rows: Sequence[Matrix], name: str) -> tuple[Cell, ...]:
    """The cells of matrices that are equal but for their zeros and errors, which are spans."""
    matrix = rows[0]
    return (
        Code(name.removesuffix(".weight")),
        f"{matrix.shape[0]}x{matrix.shape[1]}",
        str(matrix.spec),
        _agreed(matrix.stored),
        _agreed({graph: pattern or "dense" for graph, pattern in matrix.pattern.items()}),
        _zeros([next(iter(row.zeros.values()), None) for row in rows]),
        _sparse_along_k(matrix),
        _errors([row.sensitivity if _measured(run) else row.projection for row in rows], _measured(run)),
        *_kernels(run, matrix),
        "; ".join(matrix.problems) or "none",
    )


def _zeros(figures: Sequence[Figure | None]) -> Cell:
    known = sorted((figure for figure in figures if figure is not None), key=lambda figure: figure.number or 0.0)
    if not known or known[0].shown("share").text == known[-1].shown("share").text:
        return or_dash(known[0] if known else None, "share")
    return pair(known[0], known[-1], "share")


def _errors(errors: Sequence[float | None], measured: bool) -> str:
    known = [error for error in errors if error is not None]
    if not known:
        return "-"
    texts = [f"{error:.2g}" if measured else f"{error:.2%}" for error in (min(known), max(known))]
    return " to ".join(dict.fromkeys(texts))


def _kernels(run: Run, matrix: Matrix) -> tuple[str, ...]:
    """What each engine that has kernels of the matrices runs this one on."""
    return tuple(
        _kernels_of({row.name: row for row in engine.matrices}, matrix) for engine in run.engines if engine.matrices
    )


def _kernels_of(by_name: Mapping[str, WeightSparsity], matrix: Matrix) -> str:
    """The kernel of a matrix, or those of its parts where the engine has parts."""
    found = {name: _kernel(by_name[name]) for name in matrix.names if name in by_name}
    return _agreed({name.split(".")[-2]: text for name, text in found.items()}) if found else _kernel(None)


def _agreed(by_graph: Mapping[str, str]) -> str:
    values = list(dict.fromkeys(by_graph.values()))
    if len(values) <= 1:
        return values[0] if values else "not exported"
    return ", ".join(f"{graph} {value}" for graph, value in by_graph.items())


def _sparse_along_k(matrix: Matrix) -> str:
    if not matrix.pattern:
        return "unknown"
    try:
        sparse = [pattern is not None and NMPattern.parse(pattern).implies_2_4 for pattern in matrix.pattern.values()]
    except PlanError:
        return "unknown"
    return "yes" if all(sparse) else "no"


def _kernel(matrix: WeightSparsity | None) -> str:
    if matrix is None:
        return "unknown"
    kernel = (matrix.kernel or "").split("_tilesize")[0]
    if matrix.chosen is True:
        return f"sparse: {kernel}" if kernel else "sparse"
    word = "unknown" if matrix.chosen is None else f"dense: {kernel}" if kernel else "dense"
    return f"{word} ({matrix.reason})" if matrix.reason else word


def _reasons(run: Run) -> PageTable:
    """What the reasons in the kernel columns mean."""
    from engines.sparsity.sparsity_report import REASONS

    planned = {name for matrix in run.matrices for name in matrix.names}
    rows_of = [row for engine in run.engines for row in engine.matrices if row.name in planned]
    used = {row.reason for row in rows_of if row.reason}
    rows = [(Code(reason), REASONS.get(reason, "")) for reason in sorted(used)]
    return PageTable("Why a matrix is not known to run sparse", ("reason", "means"), rows)
