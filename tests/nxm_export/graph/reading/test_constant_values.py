"""What lies between a constant and its product is computed as the operators do it, whatever makes the constant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from nxm_export.graph.reading.graph_weights import GraphWeight, graph_products, load_graph
from nxm_export.graph.verifier import verify
from tests.nxm_export.graph.reading.small_graphs import DENSE, ONE, PATTERN, SPARSE, SQUARE, found, held

# name -> (declared constants, nodes that end in y)
READ = {
    "Split": (held("w", SQUARE), "d = DequantizeLinear(w, s) l, r = Split <axis=1, num_outputs=2>(d) y = MatMul(x, r)"),
    "Concat": (
        f"{held('w', DENSE[:, :3])}, {held('v', DENSE[:, 3:])}",
        "d = DequantizeLinear(w, s) e = DequantizeLinear(v, s) c = Concat <axis=1>(d, e) y = MatMul(x, c)",
    ),
    "Reshape that merges axes": (
        f"{held('w', DENSE.reshape(4, 4, 8))}, int64[2] to = {{16, 8}}",
        "d = DequantizeLinear(w, s) r = Reshape(d, to) y = MatMul(x, r)",
    ),
    "Gather": (
        f"{held('w', np.stack([SPARSE, DENSE]))}, int64 at = {{1}}",
        "d = DequantizeLinear(w, s) g = Gather(d, at) y = MatMul(x, g)",
    ),
    "Slice": (
        f"{held('w', np.vstack([SPARSE, DENSE]))}, int64[1] from = {{16}}, int64[1] to = {{32}}",
        "d = DequantizeLinear(w, s) g = Slice(d, from, to) y = MatMul(x, g)",
    ),
    "Constant node": (
        "",
        f"w = Constant <value = int8[16, 8] {{{','.join(map(str, DENSE.ravel()))}}}>() "
        "d = DequantizeLinear(w, s) y = MatMul(x, d)",
    ),
    "a long chain of Identity": (
        held("w", DENSE),
        "i0 = Identity(w) "
        + " ".join(f"i{at + 1} = Identity(i{at})" for at in range(60))
        + " d = DequantizeLinear(i60, s) y = MatMul(x, d)",
    ),
    "INT8, cast and scaled by itself": (held("w", DENSE), "c = Cast <to=1>(w) d = Mul(c, s) y = MatMul(x, d)"),
    "a mask": (
        f"{held('w', DENSE)}, {held('m', (DENSE > 40).astype(int), 'bool')}",
        "d = DequantizeLinear(w, s) f = Cast <to=1>(m) p = Mul(d, f) y = MatMul(x, p)",
    ),
    "a low-rank update": (
        f"{held('w', DENSE)}, {held('a', DENSE[:, :2], 'float')}, {held('b', DENSE[:2], 'float')}",
        "d = DequantizeLinear(w, s) ab = MatMul(a, b) u = Add(d, ab) y = MatMul(x, u)",
    ),
    "QuantizeLinear with output_dtype alone, of negative numbers": (
        held("w", DENSE * np.where(np.arange(16) % 2, 1, -1)[:, None], "float"),
        "q = QuantizeLinear <output_dtype=3>(w, s) d = DequantizeLinear(q, s) y = MatMul(x, d)",
    ),
    "QuantizeLinear in blocks, with output_dtype": (
        f"{held('w', DENSE, 'float')}, {held('t', np.full((4, 8), 2), 'float')}",
        "q = QuantizeLinear <axis=0, block_size=4, output_dtype=3>(w, t) "
        "d = DequantizeLinear <axis=0, block_size=4>(q, t) y = MatMul(x, d)",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_lies_between_constant_and_product_is_computed(name: str, tmp_path: Path) -> None:
    """The product's left input is the identity, so that what ONNX's evaluator gives is the weight itself."""
    declared, nodes = READ[name]
    text = f"g (float[16, 16] x) => (float[16, 8] y) <{', '.join(filter(None, [declared, ONE]))}> {{ {nodes} }}"
    (weight,) = found(text, tmp_path)
    assert isinstance(weight, GraphWeight)
    run = onnx.reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (truth,) = run.run(None, {"x": np.eye(16, dtype=np.float32)})
    np.testing.assert_array_equal(weight.nonzero_mask(), truth != 0)
    assert weight.quantized
    assert not weight.follows(PATTERN)
    assert not verify(tmp_path / "model.onnx", pattern=PATTERN).passed
    report = verify(tmp_path / "model.onnx")
    assert str(report.products) == "1 products, 1 read, 0 sparse"


def test_codes_are_moved_as_their_values_are_and_so_are_their_scales(tmp_path: Path) -> None:
    """Columns 7, 0, 3 of a weight with one scale per column: its codes, and the scales of these columns."""
    text = f"""g (float[b, 16] x) => (float[b, 3] y)
        <{held("w", DENSE)}, float[8] t = {{1,2,3,4,5,6,7,8}}, int64[3] at = {{7, 0, 3}}>
        {{ d = DequantizeLinear <axis=1>(w, t) g = Gather <axis=1>(d, at) y = MatMul(x, g) }}"""
    (weight,) = found(text, tmp_path)
    assert isinstance(weight, GraphWeight)
    np.testing.assert_array_equal(weight.matrix, DENSE[:, [7, 0, 3]])
    np.testing.assert_array_equal(weight.scale, [8, 1, 4])
    assert (weight.codes, weight.stored, weight.scale_axis, weight.name) == ("INT8", "INT8", "N", "w")


def test_scales_of_parts_that_are_joined_along_k_lie_in_blocks(tmp_path: Path) -> None:
    text = f"""g (float[b, 16] x) => (float[b, 8] y)
        <{held("w", SPARSE[:8])}, {held("v", SPARSE[8:])}, float s = {{1}}, float t = {{2}}>
        {{ d = DequantizeLinear(w, s) e = DequantizeLinear(v, t) c = Concat <axis=0>(d, e) y = MatMul(x, c) }}"""
    (weight,) = found(text, tmp_path)
    assert isinstance(weight, GraphWeight)
    assert (weight.name, weight.scale_axis, weight.follows(PATTERN)) == ("w + v", "K", True)


def test_a_float_weight_times_its_mask_is_what_the_two_make(tmp_path: Path) -> None:
    """As pruning leaves it where nobody folded the mask into the weight."""
    mask = np.repeat((np.arange(16) % 4 < 2)[:, None], 8, axis=1)
    text = f"""g (float[b, 16] x) => (float[b, 8] y)
        <{held("w", DENSE, "float")}, {held("m", mask.astype(int), "float")}> {{ p = Mul(w, m) y = MatMul(x, p) }}"""
    (weight,) = found(text, tmp_path)
    assert isinstance(weight, GraphWeight)
    np.testing.assert_array_equal(weight.matrix, SPARSE)
    assert (weight.pattern(), weight.quantized) == (PATTERN, False)


def test_four_bits_cast_to_eight_are_an_int8_product(tmp_path: Path) -> None:
    small = (SPARSE % 8).astype(np.int8)
    text = f"""g (float[b, 16] x) => (float[b, 8] y) <{held("w", small, "int4")}, {ONE}>
        {{ c = Cast <to=3>(w) d = DequantizeLinear(c, s) y = MatMul(x, d) }}"""
    (weight,) = found(text, tmp_path)
    assert isinstance(weight, GraphWeight)
    assert (weight.stored, weight.codes) == ("INT4", "INT8")


def test_what_products_make_of_constants_alone_is_a_constant(tmp_path: Path) -> None:
    text = f"g (float[b, 8] x) => (float y) <{held('w', DENSE, 'float')}, {held('v', DENSE.T, 'float')}> " + (
        "{ c = MatMul(v, w) y = Add(x, c) }"
    )
    assert found(text, tmp_path) == []


@pytest.mark.parametrize("where", ["initializer", "Constant"])
def test_sparse_tensors_are_read(where: str, tmp_path: Path) -> None:
    flat = np.flatnonzero(SPARSE)
    values = numpy_helper.from_array(SPARSE.astype(np.float32).ravel()[flat], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(flat.astype(np.int64), "i"), SPARSE.shape)
    inputs = [helper.make_tensor_value_info("x", 1, ["b", 16])]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if where == "Constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, ["b", 8])])
    if where == "initializer":
        graph.sparse_initializer.append(sparse)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    (weight,) = graph_products(load_graph(tmp_path / "m.onnx"))
    assert isinstance(weight, GraphWeight)
    np.testing.assert_array_equal(weight.matrix, SPARSE)
    assert "w is a sparse tensor, which TensorRT does not take; store it dense" in verify(tmp_path / "m.onnx").problems
