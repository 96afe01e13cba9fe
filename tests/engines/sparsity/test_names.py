"""The sparse kernel of one product proves nothing of another, however alike their names are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engines.sparsity.build_evidence import (
    Evidence,
    ambiguous_names,
    integer_products,
    parse_inspector,
    parse_layers,
    parse_sparsity_log,
)
from engines.sparsity.engine_report import WeightFacts, write_weight_facts
from engines.sparsity.judgement import ProductNames, judge
from engines.sparsity.kernel_names import _catalogue, is_among, kernel_named, sparse_kernel_exists
from engines.sparsity.sparsity_report import SparsityTarget, WeightSparsity
from nxm_export.storage.json_files import decode
from tests.support import onnx_text
from tests.support.sparsity_evidence import fact

SPARSE = "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_stage3_warpsize2x2x1_sptensor16x8x64"
A100 = SparsityTarget("trt", "8.6.0", "8.0")
# Each is part of another, ends or begins like it, or is read otherwise by what joins names in a builder's report.
NAMES = (
    *("layer.1", "layer.10", "layer.11", "bert.layer.1", "layer.1.dense", "layer.1.dense.1", "layer", "Layer.1"),
    *("layer_1", "layer/1", "layer.1 ", "layer.1_myl0_1", "layer.1+layer.2", "layer.1 + layer.3", "layer.1, layer.4"),
    *("layer.1 || x", "layer.1]", "[layer.1", "layer.1][ONNX Layer: layer.5", "layer.1 [profile 0]", "layer.1_1"),
)


def inspected(name: str, called: str | None = None) -> Evidence:
    """The report of an inspector on the layer of one product."""
    layer = {"Name": called or f"{name}_myl0_7", "LayerType": "gemm", "TacticName": SPARSE}
    return Evidence(parse_inspector({"Layers": [{**layer, "Metadata": f"[ONNX Layer: {name}]"}]}))


def printed(name: str) -> Evidence:
    """The line of a verbose build."""
    line = (
        f"Name: {name}_myl0_7, LayerType: gemm, Inputs: [], Outputs: [], TacticName: {SPARSE}, StreamId: 0, "
        f"Metadata: [ONNX Layer: {name}]"
    )
    return Evidence(parse_layers([line]))


def without_metadata(name: str) -> Evidence:
    """The report of an inspector that knows layers by their own names alone."""
    return Evidence(parse_inspector({"Layers": [{"Name": name, "LayerType": "gemm", "TacticName": SPARSE}]}))


def fused(name: str) -> Evidence:
    return Evidence(parse_inspector({"Layers": [{"Name": f"{name} + Relu_0", "LayerType": "", "TacticName": SPARSE}]}))


def picked(name: str) -> Evidence:
    """The builder's list alone."""
    return Evidence(log=parse_sparsity_log([f"(Sparsity) Chose 1 layer(s) using sparse tactics: {name}"]))


REPORTS: tuple[Callable[[str], Evidence], ...] = (inspected, printed, without_metadata, fused, picked)


def verdicts(evidence: Evidence, nodes: tuple[str, ...]) -> dict[str, WeightSparsity]:
    facts = [fact(name=f"weight of {node}", node=node) for node in nodes]
    ambiguous = ambiguous_names(nodes)
    return dict(zip(nodes, judge(facts, evidence, A100, names=ProductNames(nodes, ambiguous)).weights, strict=True))


@pytest.mark.parametrize("report", REPORTS)
def test_a_kernel_proves_its_own_product_alone(report: Callable[[str], Evidence]) -> None:
    for proven, other in itertools.permutations(NAMES, 2):
        found = verdicts(report(proven), (proven, other))
        assert found[other].chosen is not True, f"{proven!r} runs sparse, and that proved {other!r}"
    for name in ("layer.1", "layer.10", "bert.layer.1", "layer_1", "layer/1"):
        assert verdicts(report(name), (name, "head"))[name].chosen is True, "a plain name is proven"


@pytest.mark.parametrize("report", REPORTS)
def test_a_name_that_joins_others_proves_none_of_them(report: Callable[[str], Evidence]) -> None:
    found = verdicts(report("layer.1+layer.2"), ("layer.1", "layer.2", "layer.1+layer.2"))
    assert {weight.reason for weight in found.values()} == {"ambiguous"}
    assert "that of the node 'layer.1+layer.2', too" in found["layer.1"].detail
    assert "as other names joined" in found["layer.1+layer.2"].detail


@pytest.mark.parametrize("report", REPORTS)
def test_two_products_of_one_name_are_both_unknown(report: Callable[[str], Evidence]) -> None:
    facts = [fact(name=name) for name in ("first", "second")]
    result = judge(facts, report("node"), A100)
    assert [(weight.chosen, weight.reason) for weight in result.weights] == [(None, "ambiguous")] * 2
    assert "2 matrices are of products named 'node'" in result.weights[0].detail
    assert result.sparse_share == 0


def test_a_node_that_is_no_product_makes_a_name_ambiguous_too(tmp_path: Path) -> None:
    """What a build writes of a graph whose product and addition have one name."""
    model = onnx_text.model("""
        g (float[batch, 4] x) => (float[batch, 2] y) <float[4, 2] w = {1, 0, 1, 0, 0, 0, 0, 0}, float[2] b = {1, 2}> {
            p = MatMul(x, w)
            y = Add(p, b)
        }""")
    for node in model.graph:
        node.name = "same"
    write_weight_facts(tmp_path, model, A100)
    record = decode((tmp_path / "weights.json").read_text(), WeightFacts, schema="nxm-weights/1", source="", way_out="")
    assert record.names.nodes == ("same",)
    assert record.names.ambiguous == {"same": "2 nodes of the graph have the name 'same'"}
    assert judge([fact(node="same")], inspected("same"), A100, names=record.names).weights[0].reason == "ambiguous"


def test_a_node_that_only_left_its_scale_in_a_layer_was_not_computed_there() -> None:
    """TensorRT lists every node that a layer has something of; its name joins those that it computes."""
    layer = {"LayerType": "gemm", "TacticName": SPARSE, "Metadata": "[ONNX Layer: value][ONNX Layer: key]"}

    def named(name: str, nodes: tuple[str, ...] = ("value", "key")) -> dict[str, WeightSparsity]:
        evidence = Evidence(parse_inspector({"Layers": [{**layer, "Name": name}]}))
        facts = [fact(node=node) for node in nodes]
        known = ProductNames(("value", "key"))
        return dict(zip(nodes, judge(facts, evidence, A100, names=known).weights, strict=True))

    one = named("value_myl0_2")
    assert (one["value"].chosen, one["key"].chosen, one["key"].reason) == (True, None, "fused-away")
    assert all(weight.chosen for weight in named("key+value_myl0_2").values())
    assert {weight.reason for weight in named("__myl_Fc_myl0_2").values()} == {"ambiguous"}
    assert named("__myl_Fc_myl0_2", ("key",))["key"].reason == "ambiguous", "the other may be one of two activations"
    alone = Evidence(parse_inspector({"Layers": [{**layer, "Name": "__myl_Fc_myl0_2"}]}))
    (weight,) = judge([fact(node="value")], alone, A100, names=ProductNames(("value",))).weights
    assert weight.chosen, "the only product of its layer, whatever that is called"
    entries = [{**layer, "Name": "value_myl0_2"}, {**layer, "Name": "__myl_Fc_myl0_3", "TacticName": "sm80_xmma_gemm"}]
    both = Evidence(parse_inspector({"Layers": entries}))
    (weight,) = judge([fact(node="value")], both, A100, names=ProductNames(("value",))).weights
    assert (weight.chosen, weight.kernel) == (True, SPARSE), "another layer is named after it"


def test_names_that_myelin_rewrote_are_found_and_never_two_by_one() -> None:
    layer = {"Name": "encoder/layers_0/MatMul_myl0_7", "LayerType": "gemm", "TacticName": SPARSE}

    def found(*nodes: str) -> list[bool | None]:
        metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
        evidence = Evidence(parse_inspector({"Layers": [{**layer, "Metadata": metadata}]}))
        facts = [fact(node=node) for node in nodes]
        return [weight.chosen for weight in judge(facts, evidence, A100, names=ProductNames(nodes)).weights]

    assert found("encoder/layers.0/MatMul") == [True]
    assert found("encoder/layers.0/MatMul", "encoder/layers.00/MatMul") == [True, None]
    assert found("encoder/layers.0/MatMul", "encoder/layers-0/MatMul") == [None, None]
    assert found("encoder/layers_0/MatMul", "encoder/layers-0/MatMul") == [True, None], "one has the very name"


@pytest.mark.parametrize(
    ("seen", "ran"),
    [
        (SPARSE, True),
        (f"{SPARSE}_kernel", True),
        (f"{SPARSE}_execute_kernel_trt", True),
        (f"{SPARSE}_execute_split_k_kernel_cusparse", True),
        (f"{SPARSE}_execute_segment_k_off_kernel__5x_cublas", True),
        (f"void cask::run<{SPARSE}_execute_kernel_trt>(Params)", True),
        (f"_ZN7cutlass6KernelI{len(SPARSE)}{SPARSE}EEvNT_6ParamsE", True),
        (f"_Z{len(SPARSE) + 11}{SPARSE}_kernel_trtPv", True),
        (f"_ZN7cutlass6KernelI{len(SPARSE) + 8}{SPARSE}_aligna4EEvNT_6ParamsE", False),
        (f"_ZN7cutlass6KernelI{len(SPARSE) + 6}other_{SPARSE}EEvNT_6ParamsE", False),
        (f"_ZN7cutlass6KernelI{len(SPARSE) - 1}{SPARSE}EEvNT_6ParamsE", False),
        (f"_Z3runI{SPARSE}EEvv", False),
        (f"K{len(SPARSE)}{SPARSE}EE", False),  # is not mangled
        ("", False),
        ("sm80", False),
        ("gemm", False),
        (SPARSE[:-1], False),
        (SPARSE.removesuffix("_sptensor16x8x64"), False),
        (f"{SPARSE}0", False),
        (f"{SPARSE}_aligna4", False),
        (f"other_{SPARSE}", False),
        (SPARSE.upper(), False),
    ],
)
def test_a_kernel_ran_when_its_whole_name_was_seen(seen: str, ran: bool) -> None:
    assert is_among(SPARSE, ["another", seen]) is ran


def test_the_alignment_in_a_name_is_part_of_it() -> None:
    """TensorRT names the tactic with it, too; without it, it is another kernel."""
    aligned = f"{SPARSE}_aligna4_alignc4"
    assert is_among(aligned, [f"{aligned}_execute_kernel__5x_cublas"])
    assert not is_among(aligned, [f"{SPARSE}_execute_kernel__5x_cublas"])


def test_no_kernel_has_no_name_that_ran() -> None:
    assert not is_among("", ["", "anything"])


@pytest.mark.parametrize(
    ("name", "sparse", "integer"),
    [
        ("sm80_xmma_gemm_i8i8_i8i32_f32_sparsely_tilesize64", False, True),
        ("sm80_xmma_notsparse_gemm_i8i8", False, True),
        ("cutlass_80_tensorop_s16832gemm_f16_nospgemm", False, False),
        ("cutlass_80_tensorop_i16864spgemm_s8_256x128", True, True),
        ("sm80_xmma_sparse_gemm_f16f16_s884_tilesize64", True, False),
        ("volta_s884gemm_fp16_128x128_ldg8_f2f_nn", False, False),
        ("sm80_xmma_sparse_gemm_f16f16_f16f32_simma_tilesize64", True, False),
        ("sm90_xmma_sparse_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128", True, True),
    ],
)
def test_words_in_a_kernels_name_are_read_whole(name: str, sparse: bool, integer: bool) -> None:
    kernel = kernel_named(name)
    assert kernel is not None
    assert (kernel.sparse, kernel.integer) == (sparse, integer)


def test_a_conversion_is_no_convolution() -> None:
    assert kernel_named("void convert_sparse_int8_kernel<4>(int*)") is None


def test_products_run_on_integers_where_all_that_computes_them_does() -> None:
    def layers(*kinds: str, nodes: str = "[ONNX Layer: a]", name: str = "a") -> Evidence:
        entries = [
            {"Name": f"{name}_myl0_{at}", "LayerType": "gemm", "Inputs": [{"Datatype": kind}], "Metadata": nodes}
            for at, kind in enumerate(kinds)
        ]
        return Evidence(parse_inspector(json.loads(json.dumps({"Layers": entries}))))

    assert integer_products(layers("Int8").layers, ["a", "b"]) == (True, False)
    assert integer_products(layers("Int8", "Half").layers, ["a"]) == (False,), "one of its layers is in float"
    assert integer_products(layers("Int8").layers, ["a", "a"]) == (False, False), "two of one name"
    assert integer_products(layers("Int8").layers, ["a"], {"a": "why"}) == (False,)
    both = layers("Int8", nodes="[ONNX Layer: a][ONNX Layer: b]", name="__myl_Fc")
    assert integer_products(both.layers, ["a", "b"]) == (False, False)


@pytest.mark.parametrize(
    ("ran", "reason", "detail"),
    [
        (SPARSE, "unknown", "the build log says sparse, and not which of the sparse kernels that the profiler saw"),
        ("sm80_xmma_gemm_i8i8", "contradiction", "the build log says sparse, and the profiler saw no sparse kernel"),
    ],
)
def test_a_log_alone_is_not_said_to_name_a_kernel(ran: str, reason: str, detail: str) -> None:
    evidence = replace(picked("node"), running=frozenset({ran}))
    (weight,) = judge([fact()], evidence, A100).weights
    assert (weight.chosen, weight.reason, weight.detail) == (None, reason, detail)


# As in the libraries of cuSPARSELt 0.8.0, which torch 2.11 loads, and cuBLASLt 13. Nothing ran.
CUSPARSELT = tuple(
    f"sm{gpu}_xmma_sparse_gemm_{types}_f32_tn_{order}_{tile}_{ran}_kernel_5x_cusparselt"
    for gpu, types, tile in (
        ("90", "i8i32_i8i32", "tilesize128x128x128_cgasize2x1x1_warpgroupsize2x1x1"),
        ("90", "i8i8_i8i32", "tilesize128x192x128_cgasize2x1x1_warpgroupsize1x1x1"),
        ("90", "i8f16_i8i32", "tilesize64x128x128_cgasize1x1x1_warpgroupsize1x1x1_bias_f16"),
        ("90", "i8bf16_i8i32", "tilesize64x256x128_cgasize1x1x1_warpgroupsize1x1x1_bias_bf16"),
        ("80", "i8f16_i8i32", "tilesize128x64x128_stage4_warpsize2x2x1_sptensor16x8x64"),
        ("86", "i8i32_i8i32", "tilesize128x64x128_stage2_warpsize2x2x1_sptensor16x8x64"),
    )
    for order in "nt"
    for ran in ("execute", "execute_split_k", "execute_segment_k_on", "execute_segment_k_off")
)
CUBLASLT = (
    "sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128_cgasize1x1x1_warpgroupsize1x1x1_aligna4_alignc4_execute_"
    "segment_k_off_kernel__5x_cublas",
    "sm90_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64x128_warpgroupsize1x1x1_execute_split_k_kernel__5x_cublas",
    "ampere_int32_i8816gemm_int8_128x256_ldg16_stages_64x1_nt",
)


@pytest.mark.parametrize("name", CUSPARSELT)
def test_int8_kernels_of_cusparselt_are_sparse_products_of_integers(name: str) -> None:
    kernel = kernel_named(name)
    assert kernel is not None
    assert (kernel.sparse, kernel.integer) == (True, True)


@pytest.mark.parametrize("name", CUBLASLT)
def test_int8_kernels_of_cublaslt_are_dense(name: str) -> None:
    kernel = kernel_named(name)
    assert kernel is not None
    assert (kernel.sparse, kernel.integer) == (False, True)


@pytest.mark.parametrize(
    "name",
    [
        "sm90_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x128_cgasize1x1x1_warpgroupsize1x1x1_execute_kernel_5x_"
        "cusparselt",
        "sm90_xmma_sparse_gemm_e4m3f16_e4m3f32_f32_tn_n_tilesize64x64x128_cgasize1x1x1_warpgroupsize1x1x1",
    ],
)
def test_float_kernels_of_cusparselt_are_no_products_of_integers(name: str) -> None:
    kernel = kernel_named(name)
    assert kernel is not None
    assert (kernel.sparse, kernel.integer) == (True, False)


@pytest.mark.parametrize(
    "name",
    [
        "_ZN2at6native34sparse_semi_structured_tile_kernelINS0_11KernelTypesIN7cutlass6half_tEEENS0_18MetadataCuSparseLtE",
        "_ZN22cask_plugin__5x_cublas19avdt_sparse_reorderEPfPKfii",
        "cutlass3x_sm100_sparse_compression_8_4_pairwise_e2m1_t",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN",
    ],
)
def test_what_prepares_sparse_operands_or_says_nothing_is_no_sparse_product(name: str) -> None:
    assert kernel_named(name) is None


def test_every_row_says_of_which_kind_its_knowledge_is() -> None:
    """Nothing ran here, so that nothing is called observed; a name is read, its absence is an inference."""
    for row in _catalogue().rows:
        assert (row.kind == "unknown") is (row.exists is None), row
        if row.source.startswith("names-") and row.exists is not None:
            assert row.kind == ("read" if row.exists else "inferred"), row
    assert {row.kind for row in _catalogue().rows} == {"documented", "reported", "read", "inferred", "unknown"}


@pytest.mark.parametrize(
    ("version", "capability", "output", "begins"),
    [
        ("8.6.0", "8.0", "int8", "Read from a library: Kernel names read from libnvinfer_builder_resource"),
        ("8.6.0", "8.0", "float16", "Inferred from names that a library does not have: Kernel names read"),
        ("8.6.0", "7.5", "int8", "Documented: Sparse tensor cores came with compute capability 8.0"),
        ("10.14.1", "8.9", "int8", "Reported by others: NVIDIA/Model-Optimizer pull request 1664"),
        ("10.14.1", "9.0", "int8", "Not known: The complete library of this version"),
    ],
)
def test_an_answer_begins_with_the_kind_of_its_knowledge(
    version: str, capability: str, output: str, begins: str
) -> None:
    product = {"weights": "int8", "form": "matmul", "output": output}
    answer = sparse_kernel_exists(backend="trt", version=version, compute_capability=capability, **product)
    assert answer.source.startswith(begins)
