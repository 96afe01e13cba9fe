"""Generated graphs: the weight that the reader reports is the one that ONNX's reference evaluator computes.

The left operand of every product is the identity, so that the product's output is its weight, as the operators compute
it. The first test generates quantizers, the second what lies between constants and products, and where products stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nxm_export.contract.plan import NMPattern
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_products, load_graph
from nxm_export.graph.verifier import verify

K, N = 8, 6
PATTERN = NMPattern(2, 4)
KINDS = {
    "INT8": (TensorProto.INT8, np.int8),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT4": (TensorProto.INT4, None),
    "UINT4": (TensorProto.UINT4, None),
    "FLOAT8E4M3FN": (TensorProto.FLOAT8E4M3FN, None),
}


@dataclass
class Graph:
    """A graph that grows; each product's output is a graph output."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: list[onnx.TensorProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    names: int = 0

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def hold(self, array: np.ndarray, kind: int | None = None) -> str:
        name = self.name()
        if kind is None:
            self.held.append(numpy_helper.from_array(array, name))
        else:
            self.held.append(helper.make_tensor(name, kind, array.shape, array.ravel().tolist()))
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; returns its last output."""
        made = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=f"n{self.names}", **attributes))
        return made[-1]

    def save(self, file: Path) -> Path:
        value = helper.make_tensor_value_info
        outputs = [value(name, TensorProto.FLOAT, None) for name in self.outputs]
        inputs = [value("x", TensorProto.FLOAT, [K, K]), value("c", TensorProto.BOOL, [])]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.held)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
        return file

    def truths(self, file: Path) -> list[np.ndarray]:
        feeds = {"x": np.eye(K, dtype=np.float32), "c": np.array(True)}
        return [np.asarray(array) for array in ReferenceEvaluator(str(file)).run(None, feeds)]


@st.composite
def quantized(draw: st.DrawFn) -> Graph:
    """x times a float weight behind QuantizeLinear and DequantizeLinear of any layout, type and zero point."""
    graph = Graph()
    kind, plain = KINDS[draw(st.sampled_from(list(KINDS)))]
    layout = draw(st.sampled_from(["tensor", "axis 0", "axis 1", "blocks 0", "blocks 1"]))
    shape: tuple[int, ...] = {"tensor": (), "axis 0": (K,), "axis 1": (N,), "blocks 0": (2, N), "blocks 1": (K, 3)}[
        layout
    ]
    attributes: dict[str, int] = {} if layout == "tensor" else {"axis": int(layout[-1]) - draw(st.sampled_from([0, 2]))}
    if layout.startswith("blocks"):
        attributes["block_size"] = 4 if layout.endswith("0") else 2
    scale = graph.hold(
        np.asarray(draw(st.sampled_from([0.5, 1.0, 3.0])) * (1 + np.arange(np.prod(shape)) % 3), np.float32).reshape(
            shape
        )
    )
    parameters = [scale]
    with_zero, saturate = draw(st.booleans()), {}
    if kind == TensorProto.FLOAT8E4M3FN:
        saturate = {"saturate": int(draw(st.booleans()))}
        parameters += [graph.hold(np.zeros(shape), kind)] if with_zero else []
    elif with_zero:
        zero = np.full(shape, draw(st.integers(0, 5)))
        parameters += [graph.hold(zero, kind) if plain is None else graph.hold(zero.astype(plain))]
    output = {} if with_zero and draw(st.booleans()) else {"output_dtype": kind}
    values = draw(st.lists(st.integers(-300, 300), min_size=K * N, max_size=K * N))
    weight = np.array(values, np.float32).reshape(K, N) * draw(st.sampled_from([0.1, 1.0]))
    if draw(st.booleans()):
        weight[np.arange(K) % 4 < 2] = 0
    codes = graph.add(
        "QuantizeLinear", graph.hold(weight.astype(np.float32)), *parameters, **attributes, **saturate, **output
    )
    weight_again = graph.add("DequantizeLinear", codes, *parameters, **attributes)
    graph.outputs += [weight_again, graph.add("MatMul", "x", weight_again)]
    return graph


@settings(max_examples=60, deadline=None)
@given(graph=quantized())
def test_quantizers_are_read_as_the_evaluator_runs_them(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = graph.save(tmp_path_factory.getbasetemp() / "quantized.onnx")
    truth, _ = graph.truths(file)  # not the product's output: an FP8 overflow that is NaN spreads there
    (weight,) = graph_products(load_graph(file))
    assert isinstance(weight, GraphWeight)
    np.testing.assert_array_equal(weight.nonzero_mask(), truth != 0)
    assert weight.quantized
    assert weight.scale is not None
    zero = 0 if weight.zero_point is None else weight.zero_point.astype(np.float32)
    scale = {"tensor": weight.scale.reshape(-1, 1), "N": weight.scale.reshape(1, -1), "K": weight.scale.reshape(-1, 1)}
    if weight.scale_axis in scale:
        np.testing.assert_allclose((weight.matrix - zero) * scale[weight.scale_axis], truth, rtol=1e-6)
    assert verify(file, pattern=PATTERN).weights[0].zeros == round(float((truth == 0).mean()), 4)


# What may stand between a constant (K, N) and its product, and still gives (K, N).
def _transposed(graph: Graph, value: str) -> str:
    return graph.add("Transpose", graph.add("Transpose", value, perm=[1, 0]), perm=[1, 0])


def _split(graph: Graph, value: str) -> str:
    twice = graph.add("Concat", value, value, axis=1)
    return graph.add("Split", twice, outputs=2, axis=1, num_outputs=2)


def _reshaped(graph: Graph, value: str) -> str:
    flat = graph.add("Reshape", value, graph.hold(np.array([-1])))
    return graph.add("Reshape", flat, graph.hold(np.array([K, N])))


def _rotated(graph: Graph, value: str) -> str:
    """Rows one down: what was 2:4 need not be so any more."""
    return graph.add("Gather", value, graph.hold(np.roll(np.arange(K), 1)), axis=0)


def _shifted(graph: Graph, value: str) -> str:
    return graph.add("Add", value, graph.hold(np.array(1, np.float32)))


def _masked(graph: Graph, value: str) -> str:
    mask = (np.arange(K) % 4 < 2)[:, None] * np.ones((1, N))
    return graph.add("Mul", value, graph.hold(mask.astype(np.float32)))


def _chosen(graph: Graph, value: str) -> str:
    """Both branches of an If on an input give the weight: not read."""
    branch = [
        helper.make_graph(
            [helper.make_node("Identity", [value], [name := graph.name()])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [K, N])],
        )
        for _ in range(2)
    ]
    return graph.add("If", "c", then_branch=branch[0], else_branch=branch[1])


def _sequenced(graph: Graph, value: str) -> str:
    return graph.add("SequenceAt", graph.add("SequenceConstruct", value), graph.hold(np.array(0)))


def _same(graph: Graph, value: str) -> str:
    return graph.add("Identity", value)


STEPS = (_same, _transposed, _split, _reshaped, _rotated, _shifted, _masked, _chosen, _sequenced)


def _product(graph: Graph, value: str, form: str) -> None:
    if form == "If":
        inner = graph.name()
        branch = helper.make_graph(
            [helper.make_node("MatMul", ["x", value], [inner], name=f"p{inner}")],
            inner,
            [],
            [helper.make_tensor_value_info(inner, TensorProto.FLOAT, [K, N])],
        )
        other = graph.name()
        zeros = helper.make_graph(
            [helper.make_node("Constant", [], [other], value=numpy_helper.from_array(np.zeros((K, N), np.float32)))],
            other,
            [],
            [helper.make_tensor_value_info(other, TensorProto.FLOAT, [K, N])],
        )
        graph.outputs.append(graph.add("If", "c", then_branch=branch, else_branch=zeros))
    elif form == "left":
        turned = graph.add("Transpose", value, perm=[1, 0])
        graph.outputs.append(graph.add("Transpose", graph.add("Gemm", turned, "x"), perm=[1, 0]))
    elif form == "Einsum":
        graph.outputs.append(graph.add("Einsum", "x", value, equation="bk,kn->bn"))
    else:
        graph.outputs.append(graph.add(form, "x", value))


@st.composite
def products(draw: st.DrawFn) -> Graph:
    """One to three products of quantized weights, dense or 2:4, each behind up to three steps."""
    graph = Graph()
    for _ in range(draw(st.integers(1, 3))):
        codes = np.arange(1, K * N + 1, dtype=np.int8).reshape(K, N)
        if draw(st.booleans()):
            codes[np.arange(K) % 4 < 2] = 0
        value, scale = graph.hold(codes), graph.hold(np.array(0.5, np.float32))
        if draw(st.booleans()):
            value = graph.add("DequantizeLinear", value, scale)
        else:
            value = graph.add("Mul", graph.add("Cast", value, to=TensorProto.FLOAT), scale)
        for step in draw(st.lists(st.sampled_from(STEPS), max_size=3)):
            value = step(graph, value)
        _product(graph, value, draw(st.sampled_from(["MatMul", "Gemm", "Einsum", "If", "left"])))
    return graph


@settings(max_examples=60, deadline=None)
@given(graph=products())
def test_nothing_dense_passes_whatever_makes_it(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = graph.save(tmp_path_factory.getbasetemp() / "products.onnx")
    truths = graph.truths(file)
    sparse = [bool(((truth != 0).reshape(K // 4, 4, N).sum(axis=1) <= 2).all()) for truth in truths]
    report = verify(file, pattern=PATTERN)
    counts = report.products
    assert counts.found == len(truths)
    assert counts.sparse <= sum(sparse)
    assert report.passed == (all(sparse) and counts.read == counts.found)
    if counts.read == counts.found:
        assert counts.sparse == sum(sparse)
