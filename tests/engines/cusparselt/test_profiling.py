"""A kernel is a product's where the profiler saw it inside that product's range."""

from __future__ import annotations

from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from engines.cusparselt.profiling import KernelRun, products_of

SPARSE = "sm90_xmma_sparse_gemm_i8f16_i8i32_f32_tn_n_tilesize64x128x128_bias_f16_execute_kernel_5x_cusparselt"


def event(name: str, *children: FunctionEvent, on_gpu: bool = False) -> FunctionEvent:
    made = FunctionEvent(  # type: ignore[no-untyped-call]
        id=0, name=name, thread=0, start_us=0, end_us=9, device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU
    )
    for child in children:
        made.append_cpu_child(child)  # type: ignore[no-untyped-call]
    return made


def test_kernels_are_those_of_the_operations_within_a_products_range_and_no_others() -> None:
    multiply, quantize, copy = event("aten::_cslt_sparse_mm"), event("triton_"), event("aten::copy_")
    multiply.append_kernel(SPARSE, 0, 4.5)  # type: ignore[no-untyped-call]
    quantize.append_kernel("triton_poi_fused_nxm_after_int8_0", 0, 1.25)  # type: ignore[no-untyped-call]
    copy.append_kernel("Memcpy DtoD (Device -> Device)", 0, 2.0)  # type: ignore[no-untyped-call]
    own = event("nxm product one", event("compiled", quantize), multiply, copy)
    own.append_kernel("nxm product one", 0, 8.0)  # type: ignore[no-untyped-call]  # the range, as the GPU has it
    other = event("nxm product two", event("aten::_int_mm"))
    outside = event("aten::_cslt_sparse_mm")
    outside.append_kernel(SPARSE, 0, 4.5)  # type: ignore[no-untyped-call]
    assert products_of([own, other, outside, multiply, event("nxm product one", on_gpu=True)]) == {
        "one": (KernelRun("triton_poi_fused_nxm_after_int8_0", 1.25), KernelRun(SPARSE, 4.5)),
        "two": (),
    }
