"""What TensorRT's parser refuses or misreads: every rule, and the parser of TensorRT-RTX asked about each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.defs
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper

from nxm_export.errors import ExportError
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.tensorrt_parser import parser_of, parser_problems, require_read_right
from nxm_export.graph.verifier import verify
from tests.support.qdq_graphs import N, QdqProduct
from tests.support.trt_models import Checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable

RTX, V86, V10, V11 = (
    parser_of(*asked) for asked in (("trt_rtx", "1.7"), ("trt", "8.6"), ("trt", "10"), ("trt", "11.4"))
)
HEAD = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "com.microsoft.nchwc" : 1]>\n'


def text(body: str, opset: int = 21) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD.format(opset=opset) + body)


def one(nodes: str, constants: str = "", x: str = "float[2,4] x", y: str = "float[2,4] y") -> onnx.ModelProto:
    return text(f"g ({x}) => ({y}) <float s = {{1}}, int8 z = {{0}}, float[1,1] s2 = {{1}}{constants}> {{ {nodes} }}")


def constants_of(kind: str) -> onnx.ModelProto:
    """A file with an unused constant of this type."""
    model = one("y = Relu(x)")
    number = onnx.TensorProto.DataType.Value(kind)
    texts = kind == "STRING"
    tensor = helper.make_tensor("c", number, [4], np.array([b"a"] * 4, object) if texts else [1] * 4)
    model.graph.initializer.append(tensor)
    return model


def sparse_initializer() -> onnx.ModelProto:
    model = one("y = MatMul(x, w)")
    values, indices = helper.make_tensor("w", 1, [2], [1.0, 2.0]), helper.make_tensor("i", 7, [2], [0, 5])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    return model


def sparse_value() -> onnx.ModelProto:
    model = one("c = Constant<value_float = 1.0>() y = Add(x, c)")
    values, indices = helper.make_tensor("v", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [0])
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(
        helper.make_attribute("sparse_value", helper.make_sparse_tensor(values, indices, [4]))
    )
    return model


@dataclass(frozen=True)
class Case:
    """A graph, and the rules that speak of it for TensorRT-RTX 1.7 (and 10, 11 where `later` says no other) and 8.6."""

    name: str
    model: onnx.ModelProto
    rtx: set[str] = field(default_factory=set)
    v86: set[str] | None = None
    v10: set[str] | None = None


PRODUCT = QdqProduct
CAST_PAIR = "q = QuantizeLinear(h, t, z) d = DequantizeLinear(q, t, z) y = Cast<to = 1>(d)"
CASES = [
    Case("as it should be", PRODUCT().model()),
    Case(
        "moves around it",
        PRODUCT(moves=("Reshape", "Transpose"), weight_pair=True, weight_moves=("Transpose",)).model(),
    ),
    Case("INT32 bias", PRODUCT(bias="int32").model(), {"codes"}, {"codes", "no-zero-point"}),
    Case(
        "INT32 bias that nothing reads",
        one("d = DequantizeLinear(q, s) y = Relu(x)", ", int32[4] q = {1,2,3,4}"),
        {"codes"},
        {"codes", "no-zero-point"},
    ),
    Case(
        "INT32 bias in a branch",
        one(
            "y = If(c) <then_branch = t () => (float[2,4] a) { d = DequantizeLinear(q, s) a = Add(x, d) },"
            " else_branch = e () => (float[2,4] b) { b = Neg(x) }>",
            ", int32[4] q = {1,2,3,4}",
            "float[2,4] x, bool c",
        ),
        {"codes"},
        {"codes", "no-zero-point"},
    ),
    Case("INT16 weight", PRODUCT(weight_type="INT16").model(), {"type", "codes"}),
    Case("UINT16 weight", PRODUCT(weight_type="UINT16").model(), {"type", "codes"}),
    Case("UINT4 weight", PRODUCT(weight_type="UINT4").model(), {"type", "codes"}),
    Case("UINT8 weight", PRODUCT(weight_type="UINT8").model(), {"codes"}),
    Case("INT4 weight", PRODUCT(weight_type="INT4").model(), set(), {"type", "codes"}),
    Case("INT4 weight, cast", PRODUCT(weight_type="INT4", weight_cast=True).model(), set(), {"type"}),
    Case(
        "INT4 weight in blocks",
        PRODUCT(weight_type="INT4", weight_block=32).model(),
        set(),
        {"type", "codes", "blocks"},
    ),
    Case("UINT8 activation, zero point 0", PRODUCT(input_type="UINT8").model(), {"uint8"}),
    Case("no zero point", PRODUCT(input_type=None).model(), {"uint8"}, {"no-zero-point"}),
    Case(
        "output_dtype INT8",
        one("q = QuantizeLinear<output_dtype = 3>(x, s) y = DequantizeLinear(q, s)"),
        set(),
        {"no-zero-point"},
    ),
    Case(
        "output_dtype UINT8",
        one("q = QuantizeLinear<output_dtype = 2>(x, s) y = DequantizeLinear(q, s)"),
        {"codes"},
        {"codes", "no-zero-point"},
    ),
    Case("INT16 activation", PRODUCT(input_type="INT16").model(), {"type", "codes"}),
    Case("30 scales for 32 channels", PRODUCT(weight_scales=(0.1,) * (N - 2)).model(), {"scale-count"}),
    Case("axis out of range", PRODUCT(weight_axis=5).model(), {"scale-count"}),
    Case(
        "a scale of two dimensions",
        one("q = QuantizeLinear(x, s2, z2) y = DequantizeLinear(q, s2, z2)", ", int8[1,1] z2 = {0}"),
        {"scale-shape"},
    ),
    Case(
        "one zero point for many scales",
        one("q = QuantizeLinear(x, s4, z) y = DequantizeLinear(q, s4, z)", ", float[4] s4 = {1,1,1,1}"),
        {"zero-points"},
    ),
    Case("dynamic quantization", one("q, a, b = DynamicQuantizeLinear(x) y = Cast<to = 1>(q)"), {"operator"}),
    Case(
        "MatMulInteger",
        one("y = MatMulInteger(x, q)", ", int8[4,2] q = {1,2,3,4,1,2,3,4}", "int8[2,4] x", "int32[2,2] y"),
        {"operator"},
    ),
    Case(
        "QLinearMatMul",
        one(
            "p = QuantizeLinear(x, s, z) r = QLinearMatMul(p, s, z, q, s, z, s, z) y = DequantizeLinear(r, s, z)",
            ", int8[4,4] q = {1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4}",
        ),
        {"operator"},
    ),
    Case("contrib operator", one("y = com.microsoft.BiasGelu(x, b)", ", float[4] b = {1,2,3,4}"), {"operator"}),
    Case(
        "contrib quantizers",
        one("q = com.microsoft.QuantizeLinear(x, s, z) y = com.microsoft.DequantizeLinear(q, s, z)"),
    ),
    Case("another layout by the same name", one("y = com.microsoft.nchwc.Identity(x)"), {"domain"}),
    Case("INT16 inside", one("q = Cast<to = 5>(x) y = Cast<to = 1>(q)"), {"type"}),
    Case("UINT8 inside", one("q = Cast<to = 2>(x) y = Cast<to = 1>(q)"), {"type"}),
    Case("UINT8 at its ends", one("f = Cast<to = 1>(x) y = Cast<to = 2>(f)", "", "uint8[2,4] x", "uint8[2,4] y")),
    Case("UINT16 input", one("f = Cast<to = 1>(x) y = Relu(f)", "", "uint16[2,4] x"), {"type"}),
    Case("Gelu, which 8.6 has not", one("y = Gelu(x)"), set(), {"operator"}),
    Case("part of a shape", one("y = Shape<start = 1>(x)", "", y="int64[1] y"), set(), {"shape"}),
    Case(
        "a bfloat16 scale",
        one(f"h = Cast<to = 16>(x) {CAST_PAIR}", ", bfloat16 t = {1}"),
        set(),
        {"type", "scale-type"},
    ),
    Case("a float16 scale", one(f"h = Cast<to = 10>(x) {CAST_PAIR}", ", float16 t = {1}"), set(), {"scale-type"}),
    *(
        Case(f"a constant of type {kind}", constants_of(kind), {"type"})
        for kind in (
            "STRING",
            "INT16",
            "UINT16",
            "UINT32",
            "UINT64",
            "UINT4",
            "COMPLEX64",
            "FLOAT8E5M2",
            "FLOAT8E4M3FNUZ",
        )
    ),
    *(
        Case(f"a constant of type {kind}", constants_of(kind))
        for kind in ("BOOL", "DOUBLE", "FLOAT16", "INT32", "INT64", "UINT8")
    ),
    *(
        Case(f"a constant of type {kind}", constants_of(kind), set(), {"type"})
        for kind in ("BFLOAT16", "INT4", "FLOAT8E4M3FN")
    ),
]


def graph_of(model: onnx.ModelProto, directory: Path) -> ir.Model:
    onnx.save(model, directory / "model.onnx")
    return load_graph(directory / "model.onnx")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule_speaks_of_what_it_is_for_and_of_nothing_else(case: Case, tmp_path: Path) -> None:
    graph = graph_of(case.model, tmp_path)
    v86 = case.rtx if case.v86 is None else case.v86
    for parser, rules in ((RTX, case.rtx), (V11, case.rtx), (V86, v86)):
        problems = parser_problems(graph, parser)
        assert {problem.rule for problem in problems} == rules, list(map(str, problems))
        assert all(parser.source in str(problem) for problem in problems), "a rule says where it is known from"


@pytest.fixture(scope="module")
def rtx_parser() -> Callable[[onnx.ModelProto], bool]:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)

    def takes(model: onnx.ModelProto) -> bool:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return bool(trt.OnnxParser(network, logger).parse(model.SerializeToString()))

    return takes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensorrt_rtx_refuses_what_the_rules_say_and_takes_the_rest(
    case: Case, tmp_path: Path, rtx_parser: Callable[[onnx.ModelProto], bool]
) -> None:
    """It proves nothing of 8.6 and 10, whose rules come from their sources."""
    problems = parser_problems(graph_of(case.model, tmp_path), RTX)
    assert rtx_parser(case.model) is all(problem.misread for problem in problems)


def test_the_operators_are_those_that_tensorrt_rtx_imports() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    assert len(names) > 150
    assert {name for name in names if RTX.takes(name)} == {name for name in names if parser.supports_operator(name)}


def test_parsers_learn_so_that_an_older_version_is_judged_by_the_next_that_was_looked_at() -> None:
    names = ("8.4", "8.6", "8.6.1", "9.1", "10", "10.1", "10.2", "11.4", "10.14.1")
    known = ["8.6", "8.6", "8.6", "10.1", "10.1", "10.1", "1.7", "1.7", "1.7"]
    assert [parser_of("trt", name).known for name in names] == known
    assert V11.takes("DeformConv"), "10.1 has it, and TensorRT-RTX, which has not, is another product"
    assert not RTX.takes("DeformConv")
    assert not V10.takes("RMSNormalization")


def test_bad_scales_are_told_by_the_verifier_and_here_by_tensorrt_rtx(
    tmp_path: Path, rtx_parser: Callable[[onnx.ModelProto], bool]
) -> None:
    for scale in (float("nan"), 0.0, -0.05, -np.inf):
        for product in (QdqProduct(input_scale=scale), QdqProduct(weight_scales=(scale, *(0.01,) * (N - 1)))):
            assert not verify(product.save(tmp_path / "bad.onnx")).passed
            assert not rtx_parser(product.model())
    infinite = QdqProduct(input_scale=np.inf)
    assert not verify(infinite.save(tmp_path / "bad.onnx")).passed
    assert rtx_parser(infinite.model()), "taken: what a parser takes is not right for that"


@pytest.mark.parametrize("make", [sparse_initializer, sparse_value])
def test_sparse_tensors_are_told_by_the_verifier_and_here_by_tensorrt_rtx(
    make: Callable[[], onnx.ModelProto], tmp_path: Path, rtx_parser: Callable[[onnx.ModelProto], bool]
) -> None:
    onnx.save(make(), tmp_path / "sparse.onnx")
    assert "sparse tensor, which TensorRT does not take" in " ".join(verify(tmp_path / "sparse.onnx").problems)
    assert not rtx_parser(make())


@pytest.mark.parametrize(("target", "lowering"), [("trt", "matmul"), ("trt8", "matmul"), ("trt8", "conv1x1")])
def test_no_rule_speaks_of_our_own_graphs(checkpoints: Checkpoints, tmp_path: Path, target: str, lowering: str) -> None:
    done = export(checkpoints("bert", "attention"), tmp_path / "graph", target=target, lowering=lowering)
    graph = load_graph(done.path)
    for parser in (RTX, V10, V11) if target == "trt" else (V86, RTX, V11):
        assert not parser_problems(graph, parser), parser.name
        require_read_right(graph, parser, "graph")


def test_what_would_be_computed_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    graph = load_graph(QdqProduct(input_type="UINT8", output_type="UINT8").save(tmp_path / "uint8.onnx"))
    with pytest.raises(
        ExportError, match=r"uint8\.onnx: a_q: quantizes to UINT8, and TensorRT 11\.4 computes INT8.*1 more"
    ):
        require_read_right(graph, V11, "uint8.onnx")
