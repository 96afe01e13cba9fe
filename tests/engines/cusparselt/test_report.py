"""The verdict on the matrices of a cuSPARSELt engine: only a profiled sparse kernel of integers makes one sparse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.cusparselt.kernels import DENSE, FORMS
from engines.cusparselt.profiling import KernelRun, ProfiledRun
from engines.cusparselt.program import Choice, Measurement, Product, Program
from engines.cusparselt.report import _with_engine, at_rows, dense_form, sparse_form, times
from engines.sparsity.judgement import judge
from engines.sparsity.sparsity_report import SparsityTarget, WeightSparsity
from nxm_export.contract.records.matrix_facts import MatrixFacts
from tests.support.sparsity_evidence import fact

FIRST, SECOND = list(FORMS)[:2]
SPARSE_KERNEL = "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128"
OTHER_SPARSE = "cutlass3x_sm90_sptensorop_s64x128x64spgemm_s8_s8_s32_s8_s8_128x128x128_0_align32"
FLOAT_KERNEL = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64"
DENSE_KERNEL = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64"
FACT = fact(k=64, n=32, groups=512)
PRODUCT = Product("w", "w.codes", "w.alpha", None, 64, 32, "int8", two_four=True)
BROKEN = replace(FACT, sparse_along_k=False, broken_groups=9)
TARGET = SparsityTarget("cusparselt", "0.8", "8.0")


def choice(rows: int, form: str, dense: float = 4.0, first: float | None = 1.0, second: float | None = 2.0) -> Choice:
    """What was chosen up to so many rows, and microseconds of the dense and of two sparse forms (None: it is wrong)."""
    taken = {DENSE: dense, FIRST: first, SECOND: second}
    measured = tuple(
        Measurement(name, time, problem=None if time is not None else "it is wrong") for name, time in taken.items()
    )
    return Choice(32, 64, "int8", False, rows, form, 0, measured)


BOTH = (choice(256, DENSE, first=9.0, second=8.0), choice(1024, FIRST))
NEVER = (choice(256, DENSE, first=9.0, second=8.0), choice(1024, DENSE, first=None))
LAUNCHED = tuple(
    replace(one, measured=tuple(replace(each, in_graph=each.form == DENSE) for each in one.measured)) for one in NEVER
)
ALL_LAUNCHED = tuple(
    replace(one, measured=tuple(replace(each, in_graph=False) for each in one.measured)) for one in NEVER
)
WRONG = (choice(1024, DENSE, first=None, second=None),)


def profiled(*kernels: str, rows: int = 1024, replayed: tuple[str, ...] | None = None) -> ProfiledRun:
    return ProfiledRun("0" * 64, (rows // 32, 32), {"node": tuple(KernelRun(name, 1.0) for name in kernels)}, replayed)


def judged(
    choices: tuple[Choice, ...], run: ProfiledRun | None, fact: MatrixFacts = FACT, product: Product | None = PRODUCT
) -> WeightSparsity:
    program = Program((), (), (), {"node": product} if product else {}, {}, choices)
    return _with_engine(judge([fact], None, TARGET).weights[0], fact, program, run)


@pytest.mark.parametrize(
    ("choices", "run", "chosen", "reason"),
    [
        (BOTH, None, None, "unknown"),
        (BOTH, profiled(SPARSE_KERNEL), True, None),
        (BOTH, profiled(SPARSE_KERNEL, "another"), True, None),
        (BOTH, profiled(SPARSE_KERNEL, rows=288), True, None),
        (BOTH, profiled(SPARSE_KERNEL, rows=2048), True, None),  # the most that was measured decides
        (BOTH, profiled(DENSE_KERNEL), None, "unknown"),
        (BOTH, profiled(FLOAT_KERNEL), None, "unknown"),
        (BOTH, profiled("__myl_sparse"), None, "unknown"),
        (BOTH, profiled(), None, "unknown"),
        (BOTH, profiled(SPARSE_KERNEL, replayed=(DENSE_KERNEL, SPARSE_KERNEL)), True, None),
        (BOTH, profiled(SPARSE_KERNEL, replayed=(DENSE_KERNEL, OTHER_SPARSE)), None, "contradiction"),
        (BOTH, profiled(SPARSE_KERNEL, replayed=()), None, "unknown"),  # the profiler saw nothing of the graph
        (BOTH, profiled(DENSE_KERNEL, rows=256), False, "dense-faster"),
        (BOTH, profiled(rows=32), False, "dense-faster"),
        (BOTH, profiled(SPARSE_KERNEL, rows=256), None, "contradiction"),
        (NEVER, None, False, "dense-faster"),
        (NEVER, profiled(DENSE_KERNEL), False, "dense-faster"),
        (LAUNCHED, None, False, "no-graph"),
        (LAUNCHED, profiled(DENSE_KERNEL), False, "no-graph"),
        (ALL_LAUNCHED, None, False, "dense-faster"),
        ((NEVER[0], LAUNCHED[1]), profiled(DENSE_KERNEL, rows=256), False, "dense-faster"),
        (WRONG, None, False, "no-kernel"),
        ((), None, None, "contradiction"),
        ((replace(BOTH[1], n=64),), profiled(SPARSE_KERNEL), None, "contradiction"),
        ((replace(BOTH[1], k=128),), profiled(SPARSE_KERNEL), None, "contradiction"),
        ((replace(BOTH[1], output="float16"),), profiled(SPARSE_KERNEL), None, "contradiction"),
        ((replace(BOTH[1], bias=True),), profiled(SPARSE_KERNEL), None, "contradiction"),
    ],
)
def test_a_matrix_is_sparse_where_the_profiler_saw_it_and_nowhere_else(
    choices: tuple[Choice, ...], run: ProfiledRun | None, chosen: bool | None, reason: str | None
) -> None:
    weight = judged(choices, run)
    assert (weight.chosen, weight.reason) == (chosen, reason)
    assert weight.detail
    assert weight.eligible is {"no-kernel": False, "contradiction": weight.eligible}.get(str(reason), True)


def test_what_is_not_in_the_engine_as_2_4_is_never_sparse() -> None:
    run = profiled(SPARSE_KERNEL)
    told = judged(BOTH, run, product=replace(PRODUCT, two_four=False))
    assert (told.chosen, told.reason) == (None, "contradiction")
    told = judged(BOTH, run, product=None)
    assert (told.eligible, told.chosen, told.reason) == (False, False, "op-form")
    told = judged(BOTH, run, fact=BROKEN)
    assert (told.chosen, told.reason) == (None, "contradiction")
    for other in (None, profiled(DENSE_KERNEL), profiled(FLOAT_KERNEL), profiled()):
        told = judged(BOTH, other, fact=BROKEN)
        assert (told.chosen, told.reason) == (False, "pattern")


def test_the_time_saved_is_that_of_the_form_that_runs() -> None:
    assert judged(BOTH, None).saved_ms == 0.003
    assert judged(BOTH, profiled(SPARSE_KERNEL, rows=256)).saved_ms == 0.0
    assert judged((choice(64, SECOND),), None).saved_ms == 0.002
    assert judged((replace(choice(64, FIRST), measured=()),), None).saved_ms is None


def test_times_are_told_by_rows() -> None:
    assert [at_rows(BOTH[::-1], rows).rows for rows in (1, 256, 257, 1024, 4096)] == [256, 256, 1024, 1024, 1024]
    dense, sparse = dense_form(BOTH[0]), sparse_form(BOTH[0])
    assert dense is not None
    assert sparse is not None
    assert (dense.microseconds, sparse.microseconds, sparse_form(WRONG[0])) == (4.0, 8.0, None)
    assert times(BOTH[::-1]) == "256 rows: sparse 8.0 us, dense 4.0 us; 1024 rows: sparse 1.0 us, dense 4.0 us"
    assert times(WRONG) == "1024 rows: sparse none is right, dense 4.0 us"
