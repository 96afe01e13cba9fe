"""Which form each product runs in, decided where the engine is built: every form is tried against exact integers, and
those that are right are timed.

The nearest larger number of rows that was measured decides at run time. Products of equal sizes are measured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from engines.base import Profile
from engines.cusparselt.fusing import Compile, Function
from engines.cusparselt.kernels import DENSE, FORMS, ROWS_STEP, Call, Form, Kernels, Taken, raise_if_lost
from engines.cusparselt.products import (
    Epilogue,
    Matrix,
    epilogue_functions,
    multiply,
    padded,
    sizes_of,
    sparse_arguments,
)
from engines.cusparselt.program import Choice, Measurement, Product, Program
from nxm_export.contract.choices import SparseUse
from nxm_export.errors import EngineError
from nxm_export.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

ROWS = (32, 128, 512, 2048, 8192, 32768, 131072)  # where products are measured, as far as profiles go
# Of the share of the result that a form may be off: float sums round once more, INT8 may round a half the other way.
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
_INT8_STEPS, _INT8_SHARE = 1, 0.02


def rows_of(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """The numbers of rows to measure at: those of `ROWS` that the profiles reach, and the most that they hold."""
    most = max(profile.maximum[0] * profile.maximum[1] for profile in profiles)
    return (*(rows for rows in ROWS if rows < most), padded(most, ROWS_STEP))


def choices_for(
    program: Program,
    tensors: Mapping[str, Tensor],
    kernels: Kernels,
    rows: Sequence[int],
    use: SparseUse,
    compile_: Compile,
    progress: Progress = silent,
) -> tuple[Choice, ...]:
    """A choice for every size of product that is 2:4, at every number of rows; none where sparse is never used."""
    if use == "never":
        return ()
    sizes: dict[tuple[int, int, str, bool], Product] = {}
    for product in program.products.values():
        if product.two_four:
            sizes.setdefault(sizes_of(product), product)
    choices: list[Choice] = []
    after = epilogue_functions(compile_)
    for done, product in enumerate(sizes.values()):
        progress(f"products of {product.n} x {product.k}", done, len(sizes))
        with _failures_of_torch(f"a matrix of {product.k} x {product.n}", "take a GPU with more memory free"):
            trial = Trial(kernels, product, tensors, after)
        for count in rows:
            what = f"a product of {count} x {product.k} with {product.k} x {product.n}"
            with _failures_of_torch(what, "give smaller profiles"):
                choices.append(trial.choice(count, use))
    return tuple(choices)


@contextmanager
def _failures_of_torch(what: str, way_out: str) -> Iterator[None]:
    """What torch raises, such as for too little memory, becomes an `EngineError` that says of `what`."""
    try:
        yield
    except RuntimeError as error:
        raise_if_lost(error)
        reason = str(error).strip().splitlines()
        raise EngineError(
            f"{what} failed where its forms are timed: {reason[0][:200] if reason else type(error).__name__}; {way_out}"
        ) from error


class Trial:
    """One product, tried in every form with random codes."""

    def __init__(
        self, kernels: Kernels, product: Product, tensors: Mapping[str, Tensor], after: Callable[[str], Function]
    ) -> None:
        self._kernels, self._product = kernels, product
        self._matrix = Matrix(tensors[product.weight], kernels, two_four=True)
        self._epilogue = Epilogue(product, tensors, kernels, after)

    def choice(self, rows: int, use: SparseUse) -> Choice:
        """What runs at so many rows: the fastest form that is right, of the sparse ones alone for ``always``."""
        import torch

        generator = torch.Generator().manual_seed(rows)
        k = self._matrix.codes.shape[1]
        x = torch.randint(-127, 128, (padded(rows, ROWS_STEP), k), dtype=torch.int8, generator=generator)
        x = x.to(self._kernels.device)
        right = self._run(x, DENSE, 0)
        tried = [Measurement(DENSE, None)]
        tried += [self._tried(x, name, form, right) for name, form in FORMS.items() if self._differs(form)]
        measured = self._timed(x, tried)
        usable = [each for each in measured if each.microseconds is not None]
        if not usable:
            raise EngineError(
                f"no form of a product of {sizes_of(self._product)} could be timed: {measured[0].problem}"
            )
        sparse = [each for each in usable if each.form != DENSE]
        best = min(sparse if use == "always" and sparse else usable, key=lambda each: each.microseconds or 0.0)
        return Choice(*sizes_of(self._product), rows, best.form, best.algorithm, measured)

    def _differs(self, form: Form) -> bool:
        """Whether a form is another one for this product: only float types other than float32 have two biases."""
        half = self._product.output in ("float16", "bfloat16")
        return not form.float_bias or (half and self._product.bias is not None)

    def _tried(self, x: Tensor, name: str, form: Form, right: Tensor) -> Measurement:
        """A sparse form without its time, with what is wrong with it."""
        try:
            out, alpha, bias = sparse_arguments(self._epilogue, form)
            algorithm = self._kernels.search(self._matrix.packed, x, out, alpha, bias, transposed=form.transposed)
            wrong = deviation(self._run(x, name, algorithm), right, self._product.output)
            return Measurement(name, None, algorithm, wrong)
        except (RuntimeError, EngineError) as error:  # what a GPU or a version does not take
            raise_if_lost(error)
            return Measurement(name, None, 0, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")

    def _timed(self, x: Tensor, tried: Sequence[Measurement]) -> tuple[Measurement, ...]:
        """The same with the times of those that are right, which are measured side by side."""
        right = [each for each in tried if each.problem is None]
        calls = [self._call(x, each.form, each.algorithm) for each in right]
        times = dict(zip((each.form for each in right), self._kernels.microseconds(calls), strict=True))
        return tuple(_with_time(each, times.get(each.form)) for each in tried)

    def _call(self, x: Tensor, form: str, algorithm: int) -> Call:
        return lambda: self._run(x, form, algorithm)

    def _run(self, x: Tensor, form: str, algorithm: int) -> Tensor:
        return multiply(self._kernels, self._matrix, self._epilogue, x, form, algorithm)


def _with_time(tried: Measurement, taken: Taken | None) -> Measurement:
    if taken is None:
        return tried
    if not 0.0 < taken.microseconds < math.inf:
        return replace(tried, problem=f"the clock gave {taken.microseconds} us for a product, which takes longer")
    return replace(tried, microseconds=round(taken.microseconds, 3), in_graph=taken.in_graph)


def deviation(result: Tensor, right: Tensor, output: str) -> str | None:
    """What is wrong with a result, None for nothing: both (M, N), `right` by exact integers."""
    import torch

    if result.shape != right.shape or result.dtype is not right.dtype:
        return f"gives {result.dtype} {tuple(result.shape)} in place of {right.dtype} {tuple(right.shape)}"
    difference = (result.double() - right.double()).abs()
    if output == "int8":
        most, share = float(difference.max()), float((difference > 0).double().mean())
        wrong = most > _INT8_STEPS or share > _INT8_SHARE
        return f"differs from exact integers by up to {most:g} steps, in {share:.1%} of all" if wrong else None
    norm = float(torch.linalg.vector_norm(right.double()))
    relative = float(torch.linalg.vector_norm(difference)) / norm if norm else float(difference.max())
    # Written so that NaN is wrong, too.
    return None if relative <= _TOLERANCE[output] else f"differs from exact integers by {relative:.2g} of the result"
