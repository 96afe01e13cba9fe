"""The doctor's one judgement on files of others: what is true of each, and what must hold of any."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nxm_export.contract.plan import NMPattern
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.file_diagnosis import FileDiagnosis, diagnose_file
from tests.support.qdq_graphs import N, QdqProduct, sparse_codes

NAN, INF = float("nan"), float("inf")


def asked(product: QdqProduct, directory: Path, version: str = "8.6", gpu: str = "8.0") -> FileDiagnosis:
    return diagnose_file(product.save(directory / "model.onnx"), "trt", version, gpu)


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (QdqProduct(), "no-engine"),
        (QdqProduct(bias="float"), "no-engine"),
        (QdqProduct(moves=("Reshape", "Transpose")), "no-engine"),
        (QdqProduct(moves=("Reshape", "Transpose", "Relu", "Identity"), bias="float"), "no-engine"),
        (QdqProduct(weight_pair=True, weight_moves=("Transpose",)), "no-engine"),
        # what TensorRT refuses, and what it computes otherwise
        (QdqProduct(bias="int32"), "refused"),
        (QdqProduct(input_zero=3), "refused"),
        (QdqProduct(input_type="UINT8"), "refused"),
        (QdqProduct(output_type="UINT8"), "refused"),
        (QdqProduct(input_type=None), "refused"),
        (QdqProduct(weight_type="INT4", weight_cast=True), "refused"),
        (QdqProduct(weight_type="INT16"), "weight-type"),
        (QdqProduct(weight_type="INT4"), "weight-type"),
        (QdqProduct(weight_type="INT4", weight_block=32), "scales"),
        (QdqProduct(weight_block=32), "scales"),
        (QdqProduct(weight_zero=1), "scales"),  # 1 is zero, then, and what is stored as 0 is none
        (QdqProduct(weight_zero=1, dense=True), "not-planned"),
        (QdqProduct(weight_axis=0, weight_scales=(0.01,) * 64), "scales"),
        *((QdqProduct(weight_scales=(scale, *(0.01,) * (N - 1))), "scales") for scale in (NAN, INF, 0.0, -0.01)),
        (QdqProduct(weight_scales=(0.01,) * (N - 1)), "scales"),
        (QdqProduct(weight_scales=(0.01,)), "no-engine"),
        (QdqProduct(input_scale=NAN), "refused"),
        (QdqProduct(input_scale=INF), "refused"),
        # the weight's own pair is no pair of the input
        (QdqProduct(input_type="float"), "float-input"),
        (QdqProduct(input_type="float", weight_pair=True), "float-input"),
        (QdqProduct(input_type="float", weight_pair=True, weight_moves=("Identity",)), "float-input"),
        (QdqProduct(input_type="float", weight_pair=True, weight_moves=("Transpose",)), "float-input"),
        (QdqProduct(input_type="float", weight_pair=True, weight_moves=("Identity", "Reshape")), "float-input"),
        # what leaves in float
        (QdqProduct(output_type="float"), "float-output"),
        (QdqProduct(also_output=True), "float-output"),
        (QdqProduct(moves=("Softmax",)), "float-output"),
        (QdqProduct(dense=True), "not-planned"),
    ],
)
def test_a_product_has_the_reason_that_is_true_of_it(product: QdqProduct, reason: str, tmp_path: Path) -> None:
    (weight,) = (found := asked(product, tmp_path)).sparsity.weights
    assert (weight.reason, weight.eligible) == (reason, reason == "no-engine"), (weight.detail, found.problems)
    assert [entry.ready for entry in found.advice] == [] if reason == "not-planned" else [reason == "no-engine"]
    require_one_judgement(found)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=25)
@given(
    st.sampled_from([(N, 1, 0), (N, -1, 0), (64, 0, 0), (1, 1, 0), (2 * N, 0, 32), (16 * N, 0, 4)]),
    st.sampled_from(["INT8", "UINT8"]),
    st.sampled_from([1, 9, 100]),
    st.data(),
)
def test_zero_points_that_hide_the_pattern_are_named_as_what_stands_in_the_way(
    layout: tuple[int, int, int], kind: str, zero: int, data: st.DataObject
) -> None:
    count, axis, block = layout
    at = data.draw(st.frozensets(st.integers(0, count - 1), min_size=1))
    product = QdqProduct(
        weight_type=kind, weight_scales=(0.01,) * count, weight_axis=axis, weight_block=block,
        weight_zero=zero, weight_zero_at=at,
    )  # fmt: skip
    with TemporaryDirectory() as directory:
        found = asked(product, Path(directory))
        (report,) = verify(Path(directory) / "model.onnx", pattern=NMPattern(2, 4)).weights
    (weight,) = found.sparsity.weights
    assert (weight.reason, weight.eligible, weight.sparse_along_k) == ("scales", False, False)
    assert "a zero point is not 0" in weight.detail
    (advice,) = found.advice
    assert "zero point 0" in advice.advice
    assert any("of them because a zero point is not 0" in problem for problem in report.problems), report.problems


def test_int4_that_is_cast_to_int8_is_an_int8_product_for_versions_that_have_int4(tmp_path: Path) -> None:
    (weight,) = asked(QdqProduct(weight_type="INT4", weight_cast=True), tmp_path, "10.14", "8.9").sparsity.weights
    assert (weight.type, weight.reason, weight.ready) == ("int8", "no-engine", True)
    (weight,) = asked(QdqProduct(weight_type="INT4"), tmp_path, "10.14", "8.9").sparsity.weights
    assert (weight.type, weight.reason, weight.eligible) == ("int4", "weight-type", False)


def float_product(kind: int, directory: Path) -> Path:
    """``x -> MatMul(W)`` in a float type, W 2:4 along K."""
    if kind == TensorProto.FLOAT8E4M3FN:
        stored = helper.make_tensor("w", kind, [64, N], sparse_codes().reshape(-1).astype(np.float32))
        scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.01])
        nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
        constants, ends = [stored, scale], int(TensorProto.FLOAT)
    else:
        values = sparse_codes().astype(np.float32)
        constants, ends = [helper.make_tensor("w", kind, [64, N], values.reshape(-1))], kind
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", ends, ["b", 64])]
    outputs = [helper.make_tensor_value_info("y", ends, ["b", N])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), directory / "f.onnx"
    )
    return directory / "f.onnx"


@pytest.mark.parametrize(
    ("kind", "backend", "gpu", "eligible"),
    [
        ("FLOAT16", "trt", "8.0", True),
        ("FLOAT", "trt", "8.0", True),
        ("BFLOAT16", "trt", "8.0", False),
        ("FLOAT8E4M3FN", "trt", "8.0", False),
        ("FLOAT16", "trt_rtx", "8.9", False),
        ("BFLOAT16", "trt_rtx", "8.9", False),
        ("FLOAT8E4M3FN", "trt_rtx", "8.9", False),
        ("FLOAT8E4M3FN", "trt_rtx", "12.0", True),
    ],
)
def test_float_types_are_eligible_where_such_kernels_exist_and_ready_nowhere(
    kind: str, backend: str, gpu: str, eligible: bool, tmp_path: Path
) -> None:
    file = float_product(TensorProto.DataType.Value(kind), tmp_path)
    found = diagnose_file(file, backend, "8.6" if backend == "trt" else None, gpu)
    (weight,) = found.sparsity.weights
    assert weight.eligible is eligible, weight
    assert not any(entry.ready for entry in found.advice)
    require_one_judgement(found)


def convolution(channels: int, group: int, directory: Path, kernel: tuple[int, ...] = (2, 2)) -> Path:
    """A convolution between quantizers with `channels` inputs in `group` groups; every other pair of weights is zero,
    in the order in which they are stored."""
    out, rank = 32, len(kernel)
    shape = (out, channels // group, *kernel)
    codes = np.ones(shape, np.int8)
    codes.reshape(-1)[np.arange(codes.size) % 4 < 2] = 0
    if channels // group % 4 == 0:
        codes[:] = 1
        codes[:, np.arange(channels // group) % 4 < 2] = 0
    constants = [numpy_helper.from_array(codes, "w")]
    for name, value in (("s", np.float32(0.1)), ("z", np.int8(0))):
        constants.append(numpy_helper.from_array(np.array(value), name))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dx"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dw"], "dw"),
        helper.make_node("Conv", ["dx", "dw"], ["c"], "conv", group=group),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["qo"], "qo"),
        helper.make_node("DequantizeLinear", ["qo", "s", "z"], ["y"], "dqo"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", channels, *[16] * rank])
    graph = helper.make_graph(nodes, "g", [x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, directory / "conv.onnx")
    return directory / "conv.onnx"


@pytest.mark.parametrize(
    ("channels", "group", "reason", "eligible"),
    [
        (32, 1, "no-engine", True),
        (2, 1, "channels", False),
        (6, 1, "channels", False),
        (64, 32, "channels", False),
        (32, 32, "depthwise", False),
        (64, 8, "kernel-unknown", None),
    ],
)
def test_convolutions_need_four_channels_a_group_and_groups_are_another_kernel(
    channels: int, group: int, reason: str, eligible: bool | None, tmp_path: Path
) -> None:
    found = diagnose_file(convolution(channels, group, tmp_path), "trt", "8.6", "8.0")
    (weight,) = found.sparsity.weights
    assert (weight.reason, weight.eligible) == (reason, eligible), weight.detail
    require_one_judgement(found)


@pytest.mark.parametrize("kernel", [(4,), (1,), (2, 2), (1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    ("channels", "group", "reason"), [(32, 32, "depthwise"), (6, 1, "channels"), (64, 32, "channels")]
)
def test_the_channels_of_a_group_count_over_any_number_of_axes(
    kernel: tuple[int, ...], channels: int, group: int, reason: str, tmp_path: Path
) -> None:
    found = diagnose_file(convolution(channels, group, tmp_path, kernel), "trt", "8.6", "8.0")
    (weight,) = found.sparsity.weights
    assert (weight.reason, weight.eligible) == (reason, False), weight.detail
    require_one_judgement(found)


@pytest.mark.parametrize("kernel", [(3,), (2, 2, 2), (1,), (1, 1, 1)])
def test_of_convolutions_over_one_or_three_axes_no_kernel_is_known(kernel: tuple[int, ...], tmp_path: Path) -> None:
    found = diagnose_file(convolution(32, 1, tmp_path, kernel), "trt", "8.6", "8.0")
    (weight,) = found.sparsity.weights
    assert (weight.reason, weight.eligible) == ("kernel-unknown", None), weight.detail
    require_one_judgement(found)


@pytest.mark.parametrize("shape", [(64, 32), (4, 64, 32)])
@pytest.mark.parametrize("left", [False, True])
def test_of_a_weight_on_the_left_or_in_a_stack_no_kernel_is_known(
    shape: tuple[int, ...], left: bool, tmp_path: Path
) -> None:
    values = np.ones(shape, np.float32)
    values[..., np.arange(64) % 4 < 2, :] = 0
    rows = np.ascontiguousarray(np.swapaxes(values, -1, -2)) if left else values
    order = ["w", "x"] if left else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", order, ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(rows, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    found = diagnose_file(tmp_path / "m.onnx", "trt", "8.6", "8.0")
    (weight,) = found.sparsity.weights
    assert weight.sparse_along_k
    usual = not left and len(shape) == 2
    assert (weight.eligible, weight.reason) == ((True, "no-engine") if usual else (None, "kernel-unknown"))
    require_one_judgement(found)


def require_one_judgement(found: FileDiagnosis) -> None:
    """What must hold of every file: rows, advice, counts and problems are of one mind."""
    data = json.loads(json.dumps(found.to_dict()))
    weights, problems = found.sparsity.weights, found.problems
    advised = [entry.name for entry in found.advice]
    assert advised == [weight.name for weight in weights if weight.reason != "not-planned"]
    by_name = {weight.name: weight for weight in weights}
    for entry in found.advice:
        assert entry.ready == by_name[entry.name].ready
        assert not (entry.ready and entry.one_fix_away)
    for weight in weights:
        assert weight.detail
        assert weight.chosen is not True, "a file alone runs nothing"
        assert (weight.eligible is True) == (weight.reason == "no-engine")
        if problems:
            assert not weight.ready
            assert weight.eligible is False
        if weight.ready:
            assert weight.type == "int8"
            assert weight.sparse_along_k
    assert data["problems"] == list(problems)
    assert sum(data["counts"].values()) == len(weights)
    assert [entry["reason"] for entry in data["weights"]] == [weight.reason for weight in weights]


SCALES = st.sampled_from([0.01, 0.01, 0.01, 1.0, NAN, INF, -INF, 0.0, -0.01, 1e-42])
ZERO_TYPES = st.sampled_from(["INT8", "INT8", "INT8", "UINT8", None, "float"])
MOVES = st.lists(st.sampled_from(["Identity", "Transpose", "Reshape", "Relu", "Softmax"]), max_size=3).map(tuple)
PRODUCTS = st.builds(
    QdqProduct,
    input_type=ZERO_TYPES,
    input_scale=SCALES,
    input_zero=st.sampled_from([0, 0, 0, 3]),
    weight_type=st.sampled_from(["INT8", "INT8", "INT8", "INT4", "UINT8", "INT16", "UINT4", "FLOAT"]),
    weight_scales=st.one_of(
        st.just((0.01,) * N),
        st.sampled_from([1, 2, N - 1, N, N + 1, 64]).map(lambda count: (0.01,) * count),
        SCALES.map(lambda scale: (*(0.01,) * (N - 1), scale)),
    ),
    weight_zero=st.sampled_from([0, 0, 0, 1]),
    weight_axis=st.sampled_from([1, 1, 1, 0, -1]),
    weight_block=st.sampled_from([0, 0, 0, 32]),
    weight_cast=st.booleans(),
    bias=st.sampled_from(["none", "none", "float", "int32"]),
    moves=MOVES,
    output_type=ZERO_TYPES,
    also_output=st.booleans(),
    dense=st.booleans(),
)
PAIRED = st.builds(
    QdqProduct,
    input_type=ZERO_TYPES,
    weight_pair=st.just(True),
    weight_moves=st.lists(st.sampled_from(["Identity", "Transpose", "Reshape"]), max_size=3).map(tuple),
    output_type=ZERO_TYPES,
    dense=st.booleans(),
)
TARGETS = st.sampled_from(
    [
        ("trt", "8.6", "8.0"),
        ("trt", "8.6", "H100"),
        ("trt", "10.14", "L4"),
        ("trt", "11.4", "8.9"),
        ("trt_rtx", None, "RTX 4090"),
    ]
)


CAST = ("INT4", "UINT8")  # types that TensorRT has, and whose codes are INT8 behind a Cast


def plain(product: QdqProduct) -> bool:
    """True when the product is as a sparse INT8 kernel wants it, by what was asked for and not by what was read."""
    ideal = dataclasses.replace(
        QdqProduct(),
        bias=product.bias if product.bias == "float" else "none",
        weight_scales=product.weight_scales if set(product.weight_scales) <= {0.01, 1.0} else (0.01,) * N,
        weight_axis=product.weight_axis,
        weight_type=product.weight_type if product.weight_cast and product.weight_type in CAST else "INT8",
        weight_cast=product.weight_cast,
        weight_pair=product.weight_pair,
        weight_moves=product.weight_moves,
        input_scale=product.input_scale if product.input_scale in (0.01, 0.05, 1.0) else 0.05,
        moves=tuple(move for move in product.moves if move != "Softmax"),
    )
    channels = len(product.weight_scales) == 1 or (len(product.weight_scales) == N and product.weight_axis in (1, -1))
    return product == ideal and channels


def check(product: QdqProduct, target: tuple[str, str | None, str]) -> None:
    with TemporaryDirectory() as directory:
        found = diagnose_file(product.save(Path(directory) / "model.onnx"), *target)
    require_one_judgement(found)
    for weight in found.sparsity.weights:
        assert not weight.ready or plain(product), (product, weight)
        if plain(product) and product.weight_type == "INT8" and target == ("trt", "8.6", "8.0"):
            assert weight.ready, (product, weight, found.problems)


HERE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@settings(HERE, max_examples=40)
@given(st.one_of(PRODUCTS, PAIRED), TARGETS)
def test_only_what_is_plain_is_ready_and_every_answer_is_of_one_mind(
    product: QdqProduct, target: tuple[str, str | None, str]
) -> None:
    check(product, target)


@pytest.mark.slow  # the same, more often
@settings(HERE, max_examples=1500)
@given(st.one_of(PRODUCTS, PAIRED), TARGETS)
def test_only_what_is_plain_is_ready_in_many_graphs(product: QdqProduct, target: tuple[str, str | None, str]) -> None:
    check(product, target)


def refused_without_a_word(product: QdqProduct) -> bool:
    """True when the parser of TensorRT-RTX refuses what the doctor has no problem with."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    with TemporaryDirectory() as directory:
        found = diagnose_file(product.save(Path(directory) / "model.onnx"), "trt_rtx", None, "RTX 4090")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return not found.problems and not trt.OnnxParser(network, logger).parse(product.model().SerializeToString())


@settings(HERE, max_examples=25)
@given(st.one_of(PRODUCTS, PAIRED))
def test_what_tensorrt_rtx_refuses_has_a_problem(product: QdqProduct) -> None:
    assert not refused_without_a_word(product)


@pytest.mark.slow  # the same, more often
@settings(HERE, max_examples=1000)
@given(st.one_of(PRODUCTS, PAIRED))
def test_what_tensorrt_rtx_refuses_has_a_problem_in_many_graphs(product: QdqProduct) -> None:
    assert not refused_without_a_word(product)
