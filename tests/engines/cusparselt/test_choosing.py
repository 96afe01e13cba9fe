"""Every form is tried against exact integers; of those that are right the fastest runs, and both times are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import pytest

from engines.base import Profile
from engines.cusparselt.choosing import choices_for, deviation, rows_of
from engines.cusparselt.kernels import DENSE, FORMS, Form
from engines.cusparselt.products import Products
from engines.cusparselt.program import Choice, Product, Program
from engines.cusparselt.stand_in import IntegerReferenceKernels
from nxm_export.contract.choices import SparseUse
from tests.engines.cusparselt.machines import Priced, two_four

KERNELS = IntegerReferenceKernels()
PLAIN = KERNELS.compile  # as it is
ALL = {("int8", True): 5.0, ("int8", False): 6.0, ("float16", True): 5.0, ("float16", False): 6.0}
ALL |= {("int32", True): 7.0, ("int32", False): 8.0}


def program(n: int = 40, k: int = 72, output: str = "int8", bias: bool = True) -> tuple[Program, dict[str, object]]:
    """One product whose sizes are no multiples of 32."""
    import torch

    product = Product("w", "w.codes", "alpha", "bias" if bias else None, k, n, output, two_four=True)
    unit = 40 / (np.sqrt(k / 2) * 6200)  # results of about 40 steps of INT8
    tensors: dict[str, object] = {
        "w.codes": torch.from_numpy(two_four(n, k, 0)),
        "alpha": torch.full((n,), unit, dtype=torch.float32),
        "bias": torch.linspace(-20, 20, n),
    }
    return Program((), (), (), {"node": product}, {}), tensors


def choose(kernels: IntegerReferenceKernels, use: SparseUse = "auto", output: str = "int8") -> Choice:
    made, tensors = program(output=output)
    (choice,) = choices_for(made, tensors, kernels, (64,), use, PLAIN)  # type: ignore[arg-type]
    return choice


@pytest.mark.parametrize("output", ["int8", "float16", "float32", "bfloat16"])
def test_every_form_is_right_on_kernels_that_are_exact(output: str) -> None:
    choice = choose(IntegerReferenceKernels(), output=output)
    measured = {each.form: each for each in choice.measured}
    problems = {name: each.problem for name, each in measured.items() if each.problem}
    mixed = str(Form(True, True, True))  # a float32 bias for 16 bits, which the documented semantics refuse
    assert set(problems) == ({mixed} if output in ("float16", "bfloat16") else set())
    assert set(measured) == {DENSE, *FORMS} - (set() if output in ("float16", "bfloat16") else {mixed})


@pytest.mark.parametrize(
    ("dense", "sparse", "use", "expected"),
    [
        (9.0, ALL, "auto", "sparse fused (M, N)"),
        (9.0, {**ALL, ("int8", False): 4.0}, "auto", "sparse fused (N, M)"),
        (9.0, {("int32", False): 8.0}, "auto", "sparse int32 (N, M)"),
        (4.0, ALL, "auto", DENSE),
        (4.0, ALL, "always", "sparse fused (M, N)"),
        (4.0, {}, "always", DENSE),
    ],
)
def test_the_fastest_form_that_is_right_is_chosen(
    dense: float, sparse: Mapping[tuple[str, bool], float], use: SparseUse, expected: str
) -> None:
    choice = choose(Priced(dense, sparse), use)
    assert choice.form == expected
    times = {each.form: each.microseconds for each in choice.measured}
    assert times[DENSE] == dense  # both times are there, whatever was chosen
    if not sparse:
        problems = {each.problem for each in choice.measured if each.form != DENSE}
        assert problems == {"RuntimeError: CUDA error: no int8 here", "RuntimeError: CUDA error: no int32 here"}


def test_a_form_that_is_wrong_is_never_chosen_however_fast() -> None:
    choice = choose(Priced(9.0, {**ALL, ("int8", True): 0.1, ("int8", False): 0.2}, wrong=("int8",)))
    assert choice.form == "sparse int32 (M, N)"
    wrong = {each.form: each.problem for each in choice.measured if each.problem}
    assert set(wrong) == {"sparse fused (M, N)", "sparse fused (N, M)"}
    assert all(text is not None and "differs from exact integers" in text for text in wrong.values())


@pytest.mark.parametrize("told", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_gives_no_time_makes_no_form_fast(told: float) -> None:
    choice = choose(Priced(9.0, {("int8", True): told, ("int32", True): 8.0}))
    assert choice.form == "sparse int32 (M, N)"
    assert any("the clock gave" in (each.problem or "") for each in choice.measured)


def test_a_lost_gpu_ends_the_build() -> None:
    from nxm_export.errors import EngineError

    class Lost(IntegerReferenceKernels):
        def search(self, *arguments: object, **options: object) -> int:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(EngineError, match="the GPU stopped this process"):
        choose(Lost())


def test_too_little_memory_is_an_error_that_names_the_product() -> None:
    from nxm_export.errors import EngineError

    class Full(IntegerReferenceKernels):
        def dense(self, x: object, weight: object) -> NoReturn:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(EngineError, match=r"of 64 x 72 with 72 x 40 failed .*: CUDA out of memory.* smaller profiles"):
        choose(Full())


def test_no_clock_at_all_ends_the_build() -> None:
    from nxm_export.errors import EngineError

    with pytest.raises(EngineError, match="could be timed: the clock gave nan us"):
        choose(Priced(float("nan"), {}))


def test_never_measures_nothing() -> None:
    made, tensors = program()
    assert choices_for(made, tensors, IntegerReferenceKernels(), (64,), "never", PLAIN) == ()  # type: ignore[arg-type]


def test_rows_go_as_far_as_the_profiles() -> None:
    assert rows_of([Profile((1, 1), (8, 128), (32, 512))]) == (32, 128, 512, 2048, 8192, 16384)
    assert rows_of([Profile((1, 1), (1, 8), (3, 11))]) == (32, 48)
    assert rows_of([Profile((1, 1), (1, 8), (1, 8))]) == (32,)
    assert rows_of([Profile((1, 1), (1, 8), (4, 32))]) == (32, 128), "each number once"


@pytest.mark.parametrize("rows", [1, 17, 40, 64, 65, 130])
@pytest.mark.parametrize("output", ["int8", "float32"])
def test_sizes_are_padded_and_the_next_larger_rows_decide(rows: int, output: str) -> None:
    """Against integers, at sizes that no kernel takes, in the form of each number of rows."""
    from dataclasses import replace

    import torch

    made, tensors = program(n=40, k=72, output=output)
    forms = ("sparse fused (M, N)", "sparse int32 (N, M)", DENSE)
    choices = tuple(Choice(40, 72, output, True, r, form, 0, ()) for r, form in zip((32, 64, 128), forms, strict=True))
    products = Products(replace(made, choices=choices), tensors, KERNELS, PLAIN)  # type: ignore[arg-type]
    expected = forms[0] if rows <= 32 else forms[1] if rows <= 64 else DENSE
    assert products.form_at("node", rows) == (expected, 0)
    x = torch.randint(-127, 128, (1, rows, 72), dtype=torch.int8)
    y = products.run("node", x)
    weight, alpha, bias = (tensors[name] for name in ("w.codes", "alpha", "bias"))
    exact = (x.double() @ weight.double().t()) * alpha.double() + bias.double()  # type: ignore[attr-defined]
    if output == "int8":
        assert y.dtype is torch.int8
        exact = exact.round().clamp(-128, 127)
        assert float((y.double() - exact).abs().max()) <= 1
    else:
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
    assert y.shape == (1, rows, 40)


def test_nan_is_wrong() -> None:
    import torch

    right = torch.ones(4, 4)
    assert deviation(right * float("nan"), right, "float32") is not None
    assert deviation(right.half(), right, "float32") == ("gives torch.float16 (4, 4) in place of torch.float32 (4, 4)")
    assert deviation(right + 1e-7, right, "float32") is None


@pytest.mark.parametrize(
    ("steps", "share", "wrong"),
    [(1, 0.02, False), (-1, 0.02, False), (1, 0.021, True), (2, 0.001, True), (0, 1.0, False)],
)
def test_int8_results_may_be_one_step_off_in_two_percent(steps: int, share: float, wrong: bool) -> None:
    import torch

    right, off = torch.zeros(10, 100, dtype=torch.int8), round(1000 * share)
    result = right.clone()
    result.view(-1)[:off] = steps
    told = deviation(result, right, "int8")
    assert told == (
        f"differs from exact integers by up to {abs(steps)} steps, in {share:.1%} of all" if wrong else None
    )


@pytest.mark.parametrize(("output", "most"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_float_results_may_be_off_by_a_share_of_their_norm(output: str, most: float) -> None:
    import torch

    right = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # of norm 5
    for factor, wrong in ((0.99, False), (1.01, True)):
        for sign in (1, -1):
            result = right.clone()
            result[0, 1] = sign * 5 * most * factor
            assert (deviation(result, right, output) is not None) is wrong
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert deviation(nothing, nothing, output) is None
    assert deviation(torch.eye(2, dtype=torch.float64), nothing, output) is not None


def test_a_result_of_another_shape_or_type_is_wrong() -> None:
    import torch

    right = torch.zeros(4, 4, dtype=torch.int8)
    assert deviation(right[:, :2], right, "int8") == "gives torch.int8 (4, 2) in place of torch.int8 (4, 4)"
    assert deviation(right.int(), right, "int8") == "gives torch.int32 (4, 4) in place of torch.int8 (4, 4)"
