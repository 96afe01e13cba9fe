"""What builders and inspectors say of layers and kernels is read right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engines.sparsity.build_evidence import (
    SparsityLog,
    integer_products,
    parse_inspector,
    parse_layers,
    parse_sparsity_log,
)
from engines.sparsity.kernel_names import kernel_named
from tests.support.sparsity_evidence import DENSE_GEMM, SPARSE_GEMM, layer

GOLDEN = Path(__file__).parents[2] / "golden" / "trt"


def lines(name: str) -> list[str]:
    return (GOLDEN / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("name", "sparse", "integer"),
    [
        (SPARSE_GEMM, True, True),
        (DENSE_GEMM, False, True),
        ("sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3", True, True),
        ("sm80_xmma_fprop_sparse_conv_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize128x128x128", True, True),
        ("sm90_xmma_sparse_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize64x64x128", True, True),
        ("sm90_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", True, False),
        ("cutlass3x_sm100_sptensorop_s256x128x64spgemm_s8_s8_s32_s8_s8_256x128x128_0_align32", True, True),
        ("sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6", False, False),
    ],
)
def test_a_kernels_name_says_whether_it_is_sparse_and_integer(name: str, sparse: bool, integer: bool) -> None:
    kernel = kernel_named(name)
    assert kernel is not None
    assert (kernel.sparse, kernel.integer) == (sparse, integer)


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "__myelin_CASK_STUB",
        "__myl_SparseGemm_0xf254",
        "__myl_xmma_sparse_gemm_i8i8",
        "0x00000000000003e8",
        "sparse",
        "my_sparse_gemm",
    ],
)
def test_names_that_no_rule_knows_are_unknown(name: str | None) -> None:
    assert kernel_named(name) is None


def test_both_families_of_sparsity_lines_are_read_and_empty_lists_are_not_silence() -> None:
    old, new = parse_sparsity_log(lines("log-8.6.txt")), parse_sparsity_log(lines("log-11.txt"))
    assert old.eligible == frozenset({"MatMul_401", "Conv_619", "Relu_620", "Conv_621", "Add_627", "Relu_628"})
    assert old.picked == frozenset({"Conv_619", "Relu_620"})
    assert new.picked == frozenset({"bert.encoder.layer.10.output.dense"})
    assert new.eligible == frozenset(
        {"bert.encoder.layer.1.output.dense", "bert.encoder.layer.10.output.dense", "a", "b"}
    )
    assert parse_sparsity_log(lines("log-8.txt")).picked == frozenset()
    assert parse_sparsity_log(lines("log-empty.txt")) == SparsityLog(frozenset(), frozenset())
    assert parse_sparsity_log(["nothing of that kind"]) == SparsityLog(None, None)


def test_lists_of_several_subgraphs_are_joined() -> None:
    assert parse_sparsity_log(lines("log-8.6.txt") + lines("log-11.txt")).picked == frozenset({
        "Conv_619", "Relu_620", "bert.encoder.layer.10.output.dense",
    })  # fmt: skip

    both = ["(Sparsity) Layers eligible for sparse math: a", "(Sparsity) Layers eligible for sparse math: b + c"]
    assert parse_sparsity_log(both) == SparsityLog(frozenset({"a", "b", "c"}), None)


def test_layer_lines_of_tensorrt_10_give_kernel_types_and_onnx_names() -> None:
    gemm, norm = parse_layers(lines("layers-10.txt"))
    assert (gemm.kind, gemm.inputs, gemm.outputs) == ("gemm", ("Half",), ("Half",))
    assert gemm.onnx[0] == "/encoder/layers.0/pos_ff/output/MatMul"
    assert gemm.is_product
    assert not gemm.is_integer_product
    assert not norm.is_product


@pytest.mark.parametrize(
    ("kind", "kernel", "inputs", "product", "integer"),
    [
        ("gemm", "", ("Int8",), True, True),
        ("gemm", "", ("Int8", "Int8"), True, True),
        ("gemm", "", ("Int8", "Half"), True, False),
        ("gemm", "", (), True, False),
        ("kgen", DENSE_GEMM, ("Int8",), True, True),
        ("kgen", "", ("Int8",), False, False),
    ],
)
def test_a_product_is_of_integers_where_all_of_its_inputs_are(
    kind: str, kernel: str, inputs: tuple[str, ...], product: bool, integer: bool
) -> None:
    found = replace(layer(kernel, kind=kind), inputs=inputs)
    assert (found.is_product, found.is_integer_product) == (product, integer)


def test_layers_and_tensors_without_details_are_read_by_name() -> None:
    layers = ["other [profile 1]", "a + b", {"Name": "c", "Inputs": ["x", {"Name": "y"}, {"Format/Datatype": "Int8"}]}]
    first, second = parse_inspector({"Layers": layers})
    assert (first.name, first.onnx, first.kernel) == ("a + b", ("a", "b"), "")
    assert (second.name, second.inputs) == ("c", ("", "", "Int8"))
    assert [layer.name for layer in parse_inspector({"Layers": layers}, profile=1)] == ["other", "a + b", "c"]


def test_inspector_reports_of_10_and_11_give_the_same_facts() -> None:
    ten = parse_inspector(json.loads((GOLDEN / "inspector-10.json").read_text(encoding="utf-8")))
    eleven = parse_inspector(json.loads((GOLDEN / "inspector-11.json").read_text(encoding="utf-8")))
    assert [layer.saw_sparse_weights for layer in ten] == [True, True]
    assert ten[0].onnx == ("resnetv15_stage3_conv4_fwd", "resnetv15_stage3_batchnorm4_fwd")
    assert ten[0].is_integer_product
    assert len(eleven) == 1, "the layer of the other profile is not this profile's"
    assert eleven[0].onnx == ("v", "k", "q")
    assert integer_products(eleven, ["q", "o"]) == (True, False)
    other = parse_inspector(json.loads((GOLDEN / "inspector-11.json").read_text(encoding="utf-8")), profile=1)
    assert DENSE_GEMM.startswith("sm80_xmma_gemm_i8i8")
    assert "sparse" not in other[-1].kernel
