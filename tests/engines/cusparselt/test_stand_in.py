"""The stand-in of cuSPARSELt computes the documented semantics, against plain integers, and refuses what a GPU
refuses."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from engines.cusparselt.kernels import Kernels
from engines.cusparselt.stand_in import IntegerReferenceKernels
from nxm_export.errors import EngineError
from tests.engines.cusparselt.machines import two_four

KERNELS: Kernels = IntegerReferenceKernels()


@settings(max_examples=25)
@given(n=st.sampled_from((32, 64)), k=st.sampled_from((32, 96)), seed=st.integers(0, 2**16))
def test_a_matrix_comes_back_from_its_compressed_form(n: int, k: int, seed: int) -> None:
    import torch

    weight = torch.from_numpy(two_four(n, k, seed))
    kernels = IntegerReferenceKernels()
    packed = kernels.compress(weight)
    assert packed.dtype is torch.int8
    assert packed.shape == (n, k * 10 // 16)  # torch 2.11 reads N from it, and takes nothing flat
    assert torch.equal(kernels.decompress(packed, k), weight)
    with pytest.raises(EngineError, match="is none of K"):
        kernels.decompress(packed.reshape(-1), k)


@settings(max_examples=25)
@given(
    rows=st.sampled_from((32, 48)),
    output=st.sampled_from(("int8", "int32", "float16", "bfloat16")),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_product_is_that_of_integers(rows: int, output: str, transposed: bool, seed: int) -> None:
    import torch

    random = np.random.default_rng(seed)
    weight, x = two_four(32, 64, seed), random.integers(-127, 128, (rows, 64)).astype(np.int8)
    sums = x.astype(np.int64) @ weight.astype(np.int64).T
    alpha = random.random(32).astype(np.float32) * 1e-3
    bias = random.standard_normal(32).astype(np.float32) * 20
    out: torch.dtype = getattr(torch, output)
    typed = torch.from_numpy(bias).to(out if output.startswith(("f", "b")) else torch.float32)
    scaled = output != "int32"
    y = KERNELS.sparse(
        KERNELS.compress(torch.from_numpy(weight)),
        torch.from_numpy(x),
        out,
        torch.from_numpy(alpha) if scaled else None,
        typed if scaled else None,
        0,
        transposed=transposed,
    )
    assert y.dtype is out
    assert y.is_contiguous() is transposed, "else the kernel writes (N, M)"
    exact = sums * alpha.astype(np.float64) + typed.double().numpy() if scaled else sums
    if output == "int8":
        rounded = np.clip(np.rint(exact), -128, 127)
        assert np.abs(y.numpy() - rounded).max() <= 1  # a half may round either way: the sum is in float32
        assert (y.numpy() != rounded).mean() < 0.01
    else:
        steps = {"int32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[output]
        assert (np.abs(y.double().numpy() - exact) <= np.abs(exact) * steps + 1e-4 * bool(steps)).all()


@pytest.mark.parametrize(
    ("rows", "k", "message"),
    [(16, 64, "operand .* of 16 x 64"), (40, 64, "operand .* of 40 x 64"), (32, 48, "operand .* of 32 x 48")],
)
def test_sizes_that_a_gpu_refuses_are_refused(rows: int, k: int, message: str) -> None:
    import torch

    packed = KERNELS.compress(torch.zeros(32, 96, dtype=torch.int8))
    with pytest.raises(EngineError, match=message):
        KERNELS.sparse(packed, torch.zeros(rows, k, dtype=torch.int8), torch.int32, None, None, 0, transposed=True)


def test_what_is_no_two_four_matrix_is_refused() -> None:
    import torch

    dense = torch.ones(32, 32, dtype=torch.int8)
    with pytest.raises(EngineError, match="keeps more than two"):
        KERNELS.compress(dense)
    for wrong in (
        torch.zeros(16, 32, dtype=torch.int8),
        torch.zeros(32, 32),
        torch.zeros(64, 32, dtype=torch.int8).t(),
    ):
        with pytest.raises(EngineError, match="takes no matrix"):
            KERNELS.compress(wrong)


def test_vectors_of_the_wrong_type_or_length_are_refused() -> None:
    import torch

    packed, x = KERNELS.compress(torch.zeros(32, 32, dtype=torch.int8)), torch.zeros(32, 32, dtype=torch.int8)
    for alpha, bias, message in (
        (torch.ones(32).half(), None, "alpha is torch.float16"),
        (torch.ones(31), None, "a vector of 31 for 32"),
        (torch.ones(32), torch.ones(32), "the bias of torch.float16 must be torch.float16"),
    ):
        with pytest.raises(EngineError, match=message):
            KERNELS.sparse(packed, x, torch.float16, alpha, bias, 0, transposed=True)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_dense_product_takes_more_than_16_rows(rows: int) -> None:
    import torch

    with pytest.raises(EngineError, match="_int_mm takes no"):
        KERNELS.dense(torch.zeros(rows, 32, dtype=torch.int8), torch.zeros(32, 32, dtype=torch.int8))
