"""Every product with a constant operand is found, wherever it stands: read, or listed with the reason why not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from nxm_export.contract.records.matrix_facts import UnreadProduct
from nxm_export.errors import ArtifactError
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_products, load_graph
from nxm_export.graph.reading.sparsity_scan import scan_products
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.file_diagnosis import diagnose_file
from tests.nxm_export.graph.reading.small_graphs import DENSE, ONE, PATTERN, SPARSE, SQUARE, found, held
from tests.support import onnx_text

# A product in each of these places reads the dense weight w.
PLACES = {
    "the left of a Gemm": "g (float[8, 5] x) => (float y) <W> { d = DequantizeLinear(w, s) y = Gemm <transA=1>(d, x) }",
    "a branch of an If": """g (float[b, 16] x, bool c) => (float y) <W> { y = If (c) <
        then_branch = one () => (float a) { d = DequantizeLinear(w, s) a = MatMul(x, d) },
        else_branch = two () => (float e) { e = ReduceMax(x) }> }""",
    "the body of a Loop": """g (float[b, 16] x, int64 n) => (float y) <W, bool t = {1}> { y = Loop (n, t, x) <
        body = again (int64 i, bool c, float[b, 16] h) => (bool o, float[b, 16] k)
        { o = Identity(c) d = DequantizeLinear(w, s) m = MatMul(h, d) k = Concat <axis=1>(m, m) }> }""",
    "a local function": """g (float[b, 16] x) => (float y) <W> { y = local.layer(x, w, s) }
        <domain: "local", opset_import: ["" : 21]>
        layer (a, b, c) => (z) { d = DequantizeLinear(b, c) z = MatMul(a, d) }""",
    "an initializer that an input may override": """g (float[b, 16] x, int8[16, 8] w) => (float y) <W>
        { d = DequantizeLinear(w, s) y = MatMul(x, d) }""",
    "Einsum": """g (float[b, t, 16] x) => (float y) <W>
        { d = DequantizeLinear(w, s) y = Einsum <equation = "btk,kn->btn">(x, d) }""",
    "FusedMatMul": """g (float[b, 16] x) => (float y) <W>
        { d = DequantizeLinear(w, s) y = com.microsoft.FusedMatMul(x, d) }""",
    "MatMulInteger": "g (int8[b, 16] x) => (int32 y) <W> { y = MatMulInteger(x, w) }",
    "the weights of com.microsoft's Attention": """
        g (float[b, t, 16] x) => (float y) <W, float[8] bias = {0,0,0,0,0,0,0,0}>
        { d = DequantizeLinear(w, s) y = com.microsoft.Attention <num_heads=1>(x, d, bias) }""",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_is_read_wherever_its_product_stands(place: str, tmp_path: Path) -> None:
    (weight,) = found(PLACES[place].replace("<W", f"<{held('w', DENSE)}, {ONE}"), tmp_path)
    assert isinstance(weight, GraphWeight)
    np.testing.assert_array_equal(weight.matrix, DENSE)
    assert any("not 2:4 along K" in line for line in verify(tmp_path / "model.onnx", pattern=PATTERN).all_problems)


# What is not read: the product, the constant, and why.
UNREAD = {
    "chosen by an If": (
        """g (float[b, 16] x, bool c) => (float y) <W> { v = If (c) <
            then_branch = one () => (float[16, 8] a) { a = DequantizeLinear(w, s) },
            else_branch = two () => (float[16, 8] e) { e = DequantizeLinear(w, s) }> [p] y = MatMul(x, v) }""",
        r"p \(MatMul\).*which branch of an If gives it",
    ),
    "carried by a Loop": (
        """g (float[b, 16] x, int64 n) => (float y) <V, bool t = {1}> { y, z = Loop (n, t, x, w) <
            body = again (int64 i, bool c, float[b, 16] h, float[16, 16] q) => (bool o, float[b, 16] k, float[16, 16] r)
            { o = Identity(c) [p] k = MatMul(h, q) r = Identity(q) }> }""",
        r"p \(MatMul\).*an input of a subgraph",
    ),
    "a slice of a Scan": (
        """g (float[b, 16] x, float[16, 16] y0) => (float y) <V> { y = Scan <num_scan_inputs = 1,
            body = again (float[b, 16] h, float[16] q) => (float[b, 16] k) { [p] k0 = MatMul(h, q) k = Add(h, k0) }
            >(x, w) }""",
        r"p \(MatMul\).*an input of a subgraph",
    ),
    "as large as an input": (
        """g (float[b, 4, 16] x) => (float y) <V, int64[1] zero = {0}, int64[2] size = {16, 16}> { h = Shape(x)
            n = Gather(h, zero) t = Concat <axis=0>(n, size) e = Expand(w, t) [p] y = MatMul(x, e) }""",
        r"p \(MatMul\).*an input of the graph decides its shape",
    ),
    "scaled by an input": (
        "g (float[b, 16] x, float t) => (float y) <W> { d = DequantizeLinear(w, t) [p] y = MatMul(x, d) }",
        r"p \(MatMul\).*its scale",
    ),
    "larger than is computed": (
        """g (float[b, 16] x) => (float y) <float[1, 1] w = {1}, int64[2] size = {16, 100000000000}>
            { e = Expand(w, size) [p] y = MatMul(x, e) }""",
        r"p \(MatMul\).*Expand would make 1.6e\+12 elements",
    ),
    "made by an operator that is not computed": (
        "g (float[b, 16] x) => (float y) <V> { e = plugin.Decode(w) [p] y = MatMul(x, e) }",
        r"p \(MatMul\).*comes from plugin::Decode",
    ),
    "an unknown operator": (
        "g (float[b, 16] x) => (float y) <V, float[16] v = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> "
        "{ [p] y = plugin.Dense(x, w, v) }",
        r"p \(Dense\).*nothing is known of this operator",
    ),
    "packed": (
        """g (float[b, 16] x) => (float y)
            <uint8[16, 1, 8] w = {ZEROS}, float[16] t = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>
            { [p] y = com.microsoft.MatMulNBits <K=16, N=16, bits=4, block_size=16>(x, w, t) }""",
        r"p \(MatMulNBits\).*packed",
    ),
    "Einsum over three operands": (
        """g (float[b, 16] x) => (float y) <V> { [p] y = Einsum <equation = "bk,kn,bn->n">(x, w, x) }""",
        r"p \(Einsum\).*two operands",
    ),
    "coefficients in attributes": (
        "g (float[b, 16] x) => (float y) { [p] y = ai.onnx.ml.LinearRegressor <coefficients = [1.0, 2.0]>(x) }",
        r"p \(LinearRegressor\).*attributes",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_listed_with_its_reason_and_never_passes(name: str, tmp_path: Path) -> None:
    text, reason = UNREAD[name]
    text = text.replace("<W", f"<{held('w', SPARSE)}, {ONE}").replace("ZEROS", ",".join("0" * 128))
    text = text.replace("<V", f"<{held('w', np.tile(SPARSE, 2), 'float')}")
    (product,) = found(text, tmp_path)
    assert isinstance(product, UnreadProduct)
    assert re.search(reason, str(product)), str(product)
    report = verify(tmp_path / "model.onnx", pattern=PATTERN)
    assert str(product) in report.problems
    assert report.products.found - report.products.read == 1
    assert report.to_dict()["products"] == {"found": 1, "read": 0, "sparse": 0}


def test_recurrent_cells_have_two_weights(tmp_path: Path) -> None:
    text = f"""g (float[t, b, 16] x) => (float y) <{held("w", np.ones((1, 24, 16)), "float")},
        {held("r", np.ones((1, 24, 8)), "float")}> {{ y, h = GRU <hidden_size=8>(x, w, r) }}"""
    read = [(p.name, p.k, p.n) for p in found(text, tmp_path) if isinstance(p, GraphWeight)]
    assert read == [("w", 16, 24), ("r", 8, 24)]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_reduced_along_the_channels_of_its_group(groups: int, tmp_path: Path) -> None:
    """As the product of its unrolled input would be: each output channel keeps two of four input channels."""
    weight = np.ones((8, 3, 2, 2), np.float32)
    weight[np.arange(8) % 4 >= 2] = 0
    text = f"""g (float[b, 8, 9, 9] x) => (float y) <{held("w", weight, "float")}>
        {{ y = ConvTranspose <group={groups}>(x, w) }}"""
    (read,) = found(text, tmp_path)
    assert isinstance(read, GraphWeight)
    assert (read.k, read.n, read.run) == (32 // groups, 3 * groups, 8 // groups)
    assert read.pattern() == PATTERN


def test_groups_of_four_never_cross_a_place_of_the_kernel(tmp_path: Path) -> None:
    """Two channels and a kernel of four places: 8 elements of K, which are 2:4 only when read across places."""
    weight = np.ones((3, 2, 4), np.float32)
    weight[:, :, 1::2] = 0
    (read,) = found(f"g (float[b, 2, 9] x) => (float y) <{held('w', weight, 'float')}> {{ y = Conv(x, w) }}", tmp_path)
    assert isinstance(read, GraphWeight)
    assert (read.k, read.run, read.follows(PATTERN)) == (8, 2, False)


@pytest.mark.parametrize(("size", "listed"), [(768, False), (16384, False), (32768, True)])
def test_a_vector_that_is_too_long_for_a_bias_may_be_a_packed_matrix(size: int, listed: bool, tmp_path: Path) -> None:
    packed = numpy_helper.from_array(np.arange(size, dtype=np.uint32).astype(np.uint8), "w")
    graph = helper.make_graph(
        [helper.make_node("PackedProduct", ["x", "w"], ["y"], "p", domain="some.where")],
        "g",
        [helper.make_tensor_value_info("x", 1, ["b", 16])],
        [helper.make_tensor_value_info("y", 1, None)],
        [packed],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("some.where", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    read = list(graph_products(load_graph(tmp_path / "model.onnx")))
    assert [type(each) for each in read] == [UnreadProduct] * listed


def test_an_empty_weight_follows_nothing(tmp_path: Path) -> None:
    (weight,) = found("g (float[b, 0] x) => (float y) <float[0, 8] w = {}> { y = MatMul(x, w) }", tmp_path)
    assert isinstance(weight, GraphWeight)
    assert (weight.k, weight.n, weight.follows(PATTERN), weight.pattern()) == (0, 8, False, None)


def test_a_weight_that_two_products_read_otherwise_is_told_by_their_nodes(tmp_path: Path) -> None:
    """2:4 along K in the first; in the second, which reads it transposed, along N."""
    square = np.hstack([SPARSE, SPARSE])
    text = f"""g (float[b, 16] x) => (float y, float z) <{held("w", square)}, {ONE}>
        {{ d = DequantizeLinear(w, s) [first] y = MatMul(x, d) t = Transpose(d) [second] z = MatMul(x, t) }}"""
    found(text, tmp_path)
    report = verify(tmp_path / "model.onnx", pattern=PATTERN)
    assert report.all_problems == ["w (second): not 2:4 along K: 32 of 64 groups keep more than 2"]
    assert str(report.products) == "2 products, 2 read, 1 sparse"


def test_the_command_line_says_what_was_not_read_and_exits_3(tmp_path: Path) -> None:
    text = f"g (float[b, 16] x) => (float y) <{held('w', SPARSE, 'float')}> {{ [p] y = plugin.Dense(x, w) }}"
    found(text, tmp_path)
    command = [sys.executable, "-m", "nxm_export"]
    for arguments, code in ((["verify", "--pattern", "2:4"], 3), (["verify"], 0), (["doctor"], 0)):
        run = subprocess.run([*command, *arguments, str(tmp_path / "model.onnx")], capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        assert "1 products, 0 read, 0 sparse" in run.stdout
        assert "not read: p (Dense): its weight w (input 1) was not read" in run.stdout


def test_a_cycle_ends(tmp_path: Path) -> None:
    model = onnx_text.model(f"g (float[b, 16] x) => (float y) <{held('w', SQUARE, 'float')}> "
                            "{ a = Identity(w) c = Identity(a) y = MatMul(x, c) }")  # fmt: skip
    first, second, _ = model.graph
    first.replace_input_with(0, second.outputs[0])
    (product,) = graph_products(model)
    assert isinstance(product, UnreadProduct)
    assert "reads its own output" in product.reason
    assert isinstance(model, ir.Model)


def test_doctor_calls_no_part_of_a_weight_ready_and_tells_the_products_of_one_weight_apart(tmp_path: Path) -> None:
    """Everything is right for a sparse kernel, but for a Split between DequantizeLinear and the products: nobody knows
    whether TensorRT sees integer weights behind it."""
    whole = np.ones((64, 64), np.int8) * (np.arange(64) % 4 < 2)[:, None].astype(np.int8)
    pair = "q{0} = QuantizeLinear({1}, s, z) d{0} = DequantizeLinear(q{0}, s, z)"
    plain = f"""g (float[b, 64] x) => (float o) <{held("w", whole)}, {ONE}, int8 z = {{0}}>
        {{ {pair.format(1, "x")} e = DequantizeLinear(w, s, z) [one] a = MatMul(d1, e) {pair.format(2, "a")}
        o = Identity(d2) }}"""
    parted = f"""g (float[b, 64] x) => (float o, float p)
        <{held("w", np.hstack([whole, whole]))}, {ONE}, int8 z = {{0}}>
        {{ {pair.format(1, "x")} e = DequantizeLinear(w, s, z) l, r = Split <axis=1, num_outputs=2>(e)
        [one] a = MatMul(d1, l) {pair.format(2, "a")} o = Identity(d2)
        [two] c = MatMul(d1, r) {pair.format(3, "c")} p = Identity(d3) }}"""
    printed = {}
    for name, text in (("plain", plain), ("parted", parted)):
        found(text, tmp_path)
        diagnosis = diagnose_file(tmp_path / "model.onnx", "trt", "8.6", "8.0")
        assert not diagnosis.problems
        printed[name] = [(weight.name, weight.node, weight.ready) for weight in diagnosis.sparsity.weights]
    assert printed == {"plain": [("w", "one", True)], "parted": [("w", "one", False), ("w", "two", False)]}
    assert all(weight.reason == "kernel-unknown" and "Split" in weight.detail for weight in diagnosis.sparsity.weights)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("y = Transpose <perm = 1>(w)", r"\(Transpose\) has perm of type INT, which is INTS"),
        ("y = Gather <axis = 1.5>(w, x)", "has axis of type FLOAT, which is INT"),
        ("y = Cast(w)", "has no attribute to"),
        ("y = Cast <to = 77>(w)", "has to 77, and there is no such element type"),
        ("y = MatMul(w)", "has 1 inputs and needs 2"),
        ("y = Concat <axis = 0>()", "has 0 inputs and needs 1"),
        ("y = Constant()", "has the attributes none"),
        ("y, z = Identity(w)", "has 2 outputs, and its operator has 1"),
        ("y = com.microsoft.DequantizeLinear(w)", "has 1 inputs and needs 2"),
    ],
)
def test_a_malformed_node_is_refused_when_the_file_is_read(nodes: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        found(f"g (float[b, 16] x) => (float y) <{held('w', DENSE)}> {{ {nodes} }}", tmp_path)


def test_a_product_of_an_input_with_a_default_is_a_product(tmp_path: Path) -> None:
    """Whoever runs the file may give that input; the weight beside it is read, and the default is none."""
    products = found(
        f"g (float[N, 16] x, float[1, 16] z) => (float[N, 8] y) <float[1, 16] z = {{{','.join(['1'] * 16)}}}, {ONE}, "
        f"{held('w', SPARSE)}, {held('v', DENSE)}> {{ d = DequantizeLinear(w, s) a = MatMul(x, d) "
        "e = DequantizeLinear(v, s) b = MatMul(z, e) y = Add(a, b) }",
        tmp_path,
    )
    assert [(product.name, product.operand) for product in products] == [("w", "input 1"), ("v", "input 1")]
    assert not verify(tmp_path / "model.onnx", pattern=PATTERN).passed


def test_a_matrix_among_the_attributes_of_an_unknown_operator_is_listed(tmp_path: Path) -> None:
    (product,) = found(
        f"g (float[N, 16] x) => (float[N, 8] y) {{ y = plugin.Packed <weight = int8[16, 8] "
        f"{{{','.join(map(str, DENSE.ravel()))}}}>(x) }}",
        tmp_path,
    )
    assert isinstance(product, UnreadProduct)
    assert "its weight of its own (an attribute) was not read" in str(product)


def test_one_of_two_is_no_two_of_four_where_k_is_no_multiple_of_four(tmp_path: Path) -> None:
    weight = np.ones((18, 8), np.int8) * (np.arange(18) % 2)[:, None].astype(np.int8)
    found(
        f"g (float[N, 18] x) => (float[N, 8] y) <{ONE}, {held('w', weight)}> "
        "{ d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        tmp_path,
    )
    report = verify(tmp_path / "model.onnx")
    assert (report.weights[0].pattern, report.products.sparse) == ("1:2", 0)
    assert diagnose_file(tmp_path / "model.onnx", "trt").sparsity.products == report.products


def test_two_of_four_run_in_no_sparse_kernel_where_k_is_no_multiple_of_four(tmp_path: Path) -> None:
    """Everything else is right for one."""
    weight = np.ones((258, 8), np.int8) * (np.arange(258) % 4 < 2)[:, None].astype(np.int8)
    found(
        f"g (float[b, 258] x) => (float[b, 8] y) <{ONE}, {held('w', weight)}, int8 z = {{0}}> "
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, s, z) m = MatMul(d, e) "
        "p = QuantizeLinear(m, s, z) y = DequantizeLinear(p, s, z) }",
        tmp_path,
    )
    (judged,) = diagnose_file(tmp_path / "model.onnx", "trt", "8.6", "8.0").sparsity.weights
    assert (judged.eligible, judged.reason, judged.ready) == (False, "k-multiple", False)
    assert not verify(tmp_path / "model.onnx", pattern=PATTERN).passed


def test_a_sparse_weight_does_not_vouch_for_a_dense_one_behind_a_split(tmp_path: Path) -> None:
    found(
        f"g (float[b, 16] x) => (float y, float t) <{ONE}, {held('v', SPARSE)}, {held('w', SQUARE)}> "
        "{ d = DequantizeLinear(v, s) y = MatMul(x, d) "
        "e = DequantizeLinear(w, s) l, r = Split <axis=1, num_outputs=2>(e) t = MatMul(x, r) }",
        tmp_path,
    )
    report = verify(tmp_path / "model.onnx", pattern=PATTERN)
    assert (report.passed, str(report.products)) == (False, "2 products, 2 read, 1 sparse")


def test_products_of_one_name_are_counted_each(tmp_path: Path) -> None:
    found(
        f"g (float[N, 16] x) => (float[N, 8] y) <{ONE}, {held('w', SPARSE)}> "
        "{ d = DequantizeLinear(w, s) [mm] a = MatMul(x, d) [mm] b = MatMul(x, d) y = Add(a, b) }",
        tmp_path,
    )
    assert str(verify(tmp_path / "model.onnx").products) == "2 products, 2 read, 2 sparse"


def test_a_convolution_of_one_place_is_one_without_saying_so(tmp_path: Path) -> None:
    """`kernel_shape` is optional, and the weight behind a DequantizeLinear has no shape of its own."""
    found(
        f"g (float[N, 16, H, W] x) => (float[N, 8, H, W] y) <{ONE}, {held('w', DENSE.T.reshape(8, 16, 1, 1))}> "
        "{ d = DequantizeLinear(w, s) y = Conv(x, d) }",
        tmp_path,
    )
    (fact,) = scan_products(load_graph(tmp_path / "model.onnx"), "model.onnx").facts
    assert fact.form == "conv1x1"


@pytest.mark.parametrize("axis", [0, 2])
def test_scales_along_an_axis_that_they_do_not_fit_are_a_problem(axis: int, tmp_path: Path) -> None:
    """As many as there are output channels, and said to lie along another axis, or along none."""
    found(
        f"g (float[N, 16] x) => (float[N, 8] y) <float[8] s = {{1,1,1,1,1,1,1,1}}, {held('w', SPARSE)}> "
        f"{{ d = DequantizeLinear <axis={axis}>(w, s) y = MatMul(x, d) }}",
        tmp_path,
    )
    report = verify(tmp_path / "model.onnx", pattern=PATTERN)
    assert report.all_problems == ["w: its 8 scales do not fit the axis that they are said to lie along"]
