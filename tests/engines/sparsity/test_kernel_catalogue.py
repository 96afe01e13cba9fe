"""The catalogue of sparse kernels says what the names in the installed TensorRT-RTX library say, and no more."""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from engines.sparsity.kernel_names import kernel_named, sparse_kernel_exists
from tools.gpu.sparse_kernels import count

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")

TYPES = {
    "i8": "int8", "s8": "int8", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "e4m3": "float8",
}  # fmt: skip
_XMMA = re.compile(r"sm(\d+)_xmma_sparse_(gemm|fprop_implicit_gemm)_(i8|e4m3|f16|bf16)(i8|e4m3|f16|bf16|f32)_")
_CUTLASS = re.compile(
    r"cutlass3x_sm(\d+)_sptensorop_\w+?spgemm_(s8|e4m3|f16|bf16)_\w+?_(?:f32|s32)_(s8|e4m3|f16|bf16|f32)_"
)
# GPUs that run the kernels of an architecture.
RUNS = {"80": ("8.0",), "86": ("8.6", "8.9"), "90": ("9.0",), "100": ("10.0",), "120": ("12.0",)}


def library() -> Path:
    spec = find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("libtensorrt_rtx.so.1")


def library_names() -> list[str]:
    return list(count(library()))


def named() -> set[tuple[str, str, str, str]]:
    """(compute capability, form, type multiplied, type written) of every sparse product that the library names."""
    found = set()
    for name in library_names():
        kernel = kernel_named(name)
        assert kernel is not None, name
        assert (kernel.sparse, kernel.integer) == (True, bool(re.search("_(i8|s8)", name))), name
        if match := _XMMA.match(f"{name}_"):
            architecture, form, read, written = match.groups()
        elif match := _CUTLASS.match(f"{name}_"):
            architecture, read, written = match.groups()
            form = "gemm"
        else:
            continue  # INT8 convolutions of sm80: the catalogue leaves those open
        kind = "matmul" if form == "gemm" else "conv"
        found |= {(capability, kind, TYPES[read], TYPES[written]) for capability in RUNS[architecture]}
    return found


@pytest.mark.slow  # 4 seconds, for a library of 230 MB
@pytest.mark.skipif(not version("tensorrt-rtx-cu13").startswith("1.7"), reason="the catalogue is of TensorRT-RTX 1.7")
def test_the_rows_of_tensorrt_rtx_are_the_names_in_its_library() -> None:
    names = named()
    assert len(names) > 20, "the names were found at all"
    for capability in ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"):
        for weights in ("int8", "float16", "bfloat16", "float32", "float8"):
            for form in ("matmul", "conv"):
                written = {
                    output for gpu, kind, read, output in names if (gpu, kind, read) == (capability, form, weights)
                }
                for output in ("int8", "float16", "bfloat16", "float32"):
                    answer = sparse_kernel_exists(
                        backend="trt_rtx", version="1.7.1", compute_capability=capability, weights=weights, form=form,
                        output=output,
                    )  # fmt: skip
                    # What a float product writes, a conversion behind it may change.
                    expected = output in written if weights == "int8" else bool(written)
                    open_question = (weights, form) == ("int8", "conv") and not capability.startswith("12")
                    assert answer.exists is (None if open_question else expected), (capability, weights, form, output)


@pytest.mark.slow  # 4 seconds, for a library of 230 MB
@pytest.mark.skipif(not version("tensorrt-rtx-cu13").startswith("1.7"), reason="the catalogue is of TensorRT-RTX 1.7")
def test_a_sparse_int8_product_has_gelu_by_erf_inside_where_the_library_names_one() -> None:
    names = re.findall(rb"(sm8[06])_xmma_(sparse_)?gemm_i8i8_\w+?_(gelu_erf|gelu)\b", library().read_bytes())
    assert {(b"sm80", b"", b"gelu_erf"), (b"sm80", b"sparse_", b"gelu")} <= set(names), "the names were found at all"
    for architecture in ("80", "86"):
        for epilogue, inside in (("gelu_tanh", b"gelu"), ("gelu_erf", b"gelu_erf")):
            for capability in RUNS[architecture]:
                answer = sparse_kernel_exists(
                    backend="trt_rtx", version="1.7.1", compute_capability=capability, weights="int8", form="matmul",
                    output="int8", epilogue=epilogue,
                )  # fmt: skip
                assert answer.exists is ((f"sm{architecture}".encode(), b"sparse_", inside) in names), epilogue
