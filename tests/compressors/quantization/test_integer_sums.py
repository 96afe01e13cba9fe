"""Sums of integer products in mixed precision, on the two kinds of device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from compressors.quantization.autograd import integer_sums


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _integers(*shape: int, largest: int, seed: int) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed))


def test_on_cuda_bfloat16_products_are_added_up_and_given_in_float32() -> None:
    with FakeTensorMode():  # shapes and types alone: no GPU is needed
        codes = torch.empty(2, 3, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(32, 64, device="cuda", dtype=torch.bfloat16)
        with _Calls() as calls:
            sums = integer_sums(codes, weight)
    assert (sums.shape, sums.dtype, sums.device.type) == ((2, 3, 32), torch.float32, "cuda")
    assert "aten.mm.dtype" in calls.names
    assert not any("_to_copy" in name for name in calls.names)  # nothing was rounded and widened again


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")),
    ],
)
@pytest.mark.parametrize("inputs", [64, 768])
def test_sums_are_those_of_integers_as_exactly_as_the_device_gives_them(device: str, inputs: int) -> None:
    codes, weight = _integers(2, 17, inputs, largest=127, seed=0), _integers(32, inputs, largest=7, seed=1)
    exact = codes @ weight.T
    sums = integer_sums(codes.to(device, torch.bfloat16), weight.to(device, torch.bfloat16)).cpu()
    assert sums.dtype == torch.float32
    if device == "cuda":
        assert torch.equal(sums, exact.float())  # at most 768 * 127 * 7 < 2**24: float32 holds each partial sum
    else:
        assert torch.equal(sums, exact.bfloat16().float())  # one rounding, at the end
    assert torch.equal(integer_sums(codes.float(), weight.float()), exact.float())


@pytest.mark.parametrize("inputs", [384, 768, 3072])
def test_what_a_cpu_rounds_does_not_depend_on_the_number_of_inputs(inputs: int) -> None:
    codes, weight = _integers(256, inputs, largest=127, seed=0), _integers(128, inputs, largest=7, seed=1)
    exact = (codes @ weight.T).double()
    error = integer_sums(codes.bfloat16(), weight.bfloat16()).double() - exact
    # .00166 of their root mean square, as `integer_sums` says: each is rounded to 8 bits, once.
    assert float((error.square().mean() / exact.square().mean()).sqrt()) == pytest.approx(0.00166, abs=0.0001)
