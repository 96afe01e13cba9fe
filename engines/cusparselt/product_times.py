"""What the INT8 products of an engine took when it was built: of its choices, at a number of rows that was measured."""

from __future__ import annotations

from pathlib import Path

from engines.cusparselt.kernels import ROWS_STEP
from engines.cusparselt.products import padded, sizes_of
from engines.cusparselt.program import Choice, Measurement, Product, program_of
from engines.cusparselt.report import dense_form, sparse_form
from engines.passport import load_passport
from engines.product_times import Form, ProductTime


def product_times(directory: Path, shape: tuple[int, int]) -> tuple[ProductTime, ...]:
    """Both forms of every INT8 product at `shape` (batch, sequence): ``int8`` is the dense one, ``int8 2:4`` what
    ``--sparse auto`` runs, the least of those that are right. Products in float were not measured, and are not there.

    An engine takes a number of rows by what was measured at the next larger one: a time of more rows is none of these,
    and so a problem. Needs no GPU.
    """
    passport = load_passport(directory)
    program = program_of(passport.read_engine(directory, passport.requires), str(directory / passport.engine))
    rows = padded(shape[0] * shape[1], ROWS_STEP)
    return tuple(time for product in program.products.values() for time in _both(product, program.choices, rows))


def _both(product: Product, choices: tuple[Choice, ...], rows: int) -> tuple[ProductTime, ProductTime]:
    of_sizes = [each for each in choices if (each.n, each.k, each.output, each.bias) == sizes_of(product)]
    choice = next((each for each in of_sizes if each.rows == rows), None)
    if choice is None:
        measured = ", ".join(str(each.rows) for each in of_sizes)
        problem = (
            f"its sizes were measured at {measured} rows, not at {rows}; build with the shape as the most of --profile"
            if measured
            else "no product of its sizes was measured, since none is 2:4 or sparse was never used; build a 2:4 graph"
        )
        return _time(product, "int8", None, problem), _time(product, "int8 2:4", None, problem)
    dense, sparse = dense_form(choice), sparse_form(choice)
    right = [each for each in (dense, sparse) if each is not None and each.microseconds is not None]
    best = min(right, key=lambda each: each.microseconds or 0.0, default=None)
    return _time(product, "int8", dense), _time(product, "int8 2:4", best)


def _time(product: Product, form: Form, measured: Measurement | None, problem: str | None = None) -> ProductTime:
    if problem is None and (measured is None or measured.microseconds is None):
        problem = f"no form of it was right: {measured.problem if measured else 'none was tried'}"
    elif problem is None and measured is not None and not measured.in_graph:
        problem = f"its form {measured.form} was timed with the host's launches, which no replayed CUDA graph has"
    taken = None if problem is not None or measured is None else measured.microseconds
    milliseconds = None if taken is None else taken / 1e3
    return ProductTime(product.name, product.k, product.n, form, milliseconds, problem)
