"""Weights are found in any graph, whatever the layout and whoever made it: by hand, by ONNX Runtime's quantizers, as
polygraphy sees them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nxm_export.contract.plan import NMPattern
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_products, graph_weights, load_graph, save_graph
from tests.support import onnx_text

# (K, N) = (4, 3): 2:4 along K in every column, and no pattern along N: row 1 is full.
W = np.array([[1, 0, 5], [2, 3, 6], [0, 0, 0], [0, 4, 0]], np.int8)
PATTERN = NMPattern(2, 4)


def text_of(array: np.ndarray) -> str:
    return "{" + ", ".join(str(value) for value in array.ravel().tolist()) + "}"


def only_weight(model: ir.Model) -> GraphWeight:
    (weight,) = graph_weights(model)
    return weight


def layer(
    body: str, weight: np.ndarray, *, kind: str = "int8", inputs: str = "float[batch, 4] x", more: str = ""
) -> ir.Model:
    shape = ", ".join(map(str, weight.shape))
    return onnx_text.model(
        f"g ({inputs}) => (float y) <{kind}[{shape}] w = {text_of(weight)}, float[3] s = {{1, 2, 4}}, float t = "
        f"{{0.5}}, "
        f"int8[3] z = {{0, 0, 0}}{more}> {{ {body} }}"
    )


# The same matrix in every layout that a linear layer is written in: as it lies in the file, and the nodes that read it.
LAYOUTS = {
    "MatMul": (W, "d = DequantizeLinear <axis = 1>(w, s, z) y = MatMul(x, d)"),
    "MatMul, last axis": (W, "d = DequantizeLinear <axis = -1>(w, s, z) y = MatMul(x, d)"),
    "MatMul, transposed": (
        W.T,
        "d = DequantizeLinear <axis = 0>(w, s, z) t2 = Transpose <perm = [1, 0]>(d) y = MatMul(x, t2)",
    ),
    "MatMul, transposed before": (W.T, "t2 = Transpose(w) d = DequantizeLinear <axis = 1>(t2, s, z) y = MatMul(x, d)"),
    "MatMul, twice transposed": (
        W,
        "a = Transpose(w) b = Transpose(a) d = DequantizeLinear <axis = 1>(b, s, z) y = MatMul(x, d)",
    ),
    "MatMul, stacked by one": (W[None], "d = DequantizeLinear <axis = 2>(w, s, z) y = MatMul(x, d)"),
    "MatMul, unsqueezed": (
        W,
        "d = DequantizeLinear <axis = 1>(w, s, z) a = Constant <value_ints = [0]>() u = Unsqueeze(d, a) y = MatMul(x, "
        "u)",
    ),
    "MatMul, squeezed": (
        W[None],
        "d = DequantizeLinear <axis = 2>(w, s, z) a = Constant <value_ints = [0]>() u = Squeeze(d, a) y = MatMul(x, u)",
    ),
    "MatMul, squeezed everywhere": (
        W[None, :, None, :],
        "d = DequantizeLinear <axis = 3>(w, s, z) u = Squeeze(d) y = MatMul(x, u)",
    ),
    "MatMul, reshaped": (
        W[None],
        "d = DequantizeLinear <axis = 2>(w, s, z) a = Constant <value_ints = [4, -1]>() u = Reshape(d, a) y = "
        "MatMul(x, u)",
    ),
    "MatMul, reshaped with zeros": (
        W[:, None],
        "d = DequantizeLinear <axis = 2>(w, s, z) a = Constant <value_ints = [0, 3]>() u = Reshape(d, a) y = MatMul(x, "
        "u)",
    ),
    "MatMul, weight on the left": (W.T, "d = DequantizeLinear <axis = 0>(w, s, z) y = MatMul(d, x)"),
    "MatMul, identity and cast": (
        W,
        "i = Identity(w) d = DequantizeLinear <axis = 1>(i, s, z) c = Cast <to = 10>(d) h = Cast <to = 10>(x) y = "
        "MatMul(h, c)",
    ),
    "Gemm": (W, "d = DequantizeLinear <axis = 1>(w, s, z) y = Gemm(x, d)"),
    "Gemm, transB": (W.T, "d = DequantizeLinear <axis = 0>(w, s, z) y = Gemm <transB = 1>(x, d)"),
    "FusedMatMul, transB": (
        W.T,
        "d = DequantizeLinear <axis = 0>(w, s, z) y = com.microsoft.FusedMatMul <transB = 1>(x, d)",
    ),
    "Conv 1x1": (
        W.T[:, :, None, None],
        "d = DequantizeLinear <axis = 0>(w, s, z) y = Conv <kernel_shape = [1, 1]>(x, d)",
    ),
    "Conv 1": (W.T[:, :, None], "d = DequantizeLinear <axis = 0>(w, s, z) y = Conv <kernel_shape = [1]>(x, d)"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_matrix(name: str) -> None:
    stored, body = LAYOUTS[name]
    weight = only_weight(layer(body, stored))
    np.testing.assert_array_equal(weight.matrix, W)
    assert (weight.k, weight.n, weight.name, weight.stored, weight.scale_axis) == (4, 3, "w", "INT8", "N")
    assert weight.is_quantized
    assert weight.follows(PATTERN)
    assert weight.pattern() == PATTERN
    assert weight.zero_point is not None


@pytest.mark.parametrize(
    "body",
    [
        "d = DequantizeLinear <axis = 1>(w, s, z) y = MatMul(x, d)",
        "d = DequantizeLinear <axis = 0>(w, s, z) y = Gemm <transB = 1>(x, d)",
    ],
)
def test_a_pattern_along_n_is_not_taken_for_one_along_k(body: str) -> None:
    along_n = np.array([[1, 2, 0, 0], [3, 0, 4, 0], [0, 5, 0, 6], [0, 0, 7, 8]], np.int8)
    along_n[2, 0] = 9  # column 0 keeps inputs 0, 1 and 2
    along_n[2, 1] = 0
    stored = along_n.T if "transB" in body else along_n
    model = layer(
        body.replace("s, z", "s4, z4"), stored, more=", float[4] s4 = {1, 1, 1, 1}, int8[4] z4 = {0, 0, 0, 0}"
    )
    assert only_weight(model).violations(PATTERN) == 1
    assert only_weight(model).pattern() is None


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("d = DequantizeLinear(w, t) y = MatMul(x, d)", "tensor"),
        ("d = DequantizeLinear <axis = 0>(w, s4) y = MatMul(x, d)", "K"),
        ("y = MatMul(x, f)", None),
    ],
)
def test_the_axis_of_the_scales_is_told(body: str, axis: str | None) -> None:
    more = f", float[4] s4 = {{1, 1, 1, 1}}, float[4, 3] f = {text_of(W)}"
    assert only_weight(layer(body, W, more=more)).scale_axis == axis


def test_float_weights_behind_their_own_quantizer_are_seen_as_its_integers() -> None:
    """As Model Optimizer and pytorch-quantization write them: float initializer, Q, DQ."""
    body = "q = QuantizeLinear <axis = 1>(w, s, z) d = DequantizeLinear <axis = 1>(q, s, z) y = MatMul(x, d)"
    scaled = W.astype(np.float32) * np.array([1, 2, 4], np.float32)
    weight = only_weight(layer(body, scaled, kind="float"))
    np.testing.assert_array_equal(weight.matrix, W)
    assert (weight.stored, weight.scale_axis, weight.is_quantized) == ("FLOAT", "N", True)


def test_asymmetric_weights_are_zero_at_their_zero_point() -> None:
    shifted = (W.astype(np.int16) + 128).astype(np.uint8)
    more = ", uint8[3] u = {128, 128, 128}, uint8 v = {128}"
    per_channel = layer("d = DequantizeLinear <axis = 1>(w, s, u) y = MatMul(x, d)", shifted, kind="uint8", more=more)
    per_tensor = layer("d = DequantizeLinear(w, t, v) y = MatMul(x, d)", shifted, kind="uint8", more=more)
    fake = layer(
        "q = QuantizeLinear(w, t, v) d = DequantizeLinear(q, t, v) y = MatMul(x, d)",
        W.astype(np.float32) / 2,
        kind="float",
        more=more,
    )
    for model in (per_channel, per_tensor, fake):
        assert only_weight(model).follows(PATTERN)
        np.testing.assert_array_equal(only_weight(model).nonzero_mask(), W != 0)


def test_four_bit_weights_are_read_as_integers() -> None:
    import ml_dtypes

    model = layer("d = DequantizeLinear <axis = 1>(w, s) y = MatMul(x, d)", W)
    model.graph.initializers["w"].const_value = ir.tensor(W.astype(ml_dtypes.int4), name="w")
    weight = only_weight(model)
    assert (weight.stored, weight.is_quantized, weight.pattern()) == ("INT4", True, PATTERN)
    np.testing.assert_array_equal(weight.matrix, W)


def test_products_without_a_constant_weight_are_skipped() -> None:
    model = onnx_text.model("g (float[a, b] x) => (float y) { t = Transpose(x) y = MatMul(x, t) }")
    assert list(graph_products(model)) == []


def test_the_matrices_of_a_stack_lie_side_by_side() -> None:
    stored = np.stack([W, 2 * W])
    stack = layer("d = DequantizeLinear(w, t) y = MatMul(x, d)", stored, inputs="float[2, 5, 4] x")
    np.testing.assert_array_equal(only_weight(stack).matrix, np.hstack([W, 2 * W]))


def test_a_convolution_is_reduced_along_its_channels() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 9, (3, 8, 2, 2)).astype(np.int8)
    weight[:, [0, 1, 4, 5]] = 0  # 2:4 along C at every place of the kernel
    model = layer("d = DequantizeLinear <axis = 0>(w, s, z) y = Conv(x, d)", weight, inputs="float[batch, 8, 9, 9] x")
    read = only_weight(model)
    assert (read.k, read.n, read.pattern()) == (32, 3, PATTERN)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "2:8", "4:8"])
def test_the_tightest_pattern_is_named(pattern: str) -> None:
    expected = NMPattern.parse(pattern)
    rng = np.random.default_rng(1)
    weight = rng.integers(1, 9, (64, 16)).astype(np.int8)
    for column in range(16):
        for start in range(0, 64, expected.m):
            weight[start + rng.permutation(expected.m)[expected.n :], column] = 0
    read = only_weight(layer("d = DequantizeLinear(w, t) y = MatMul(x, d)", weight))
    assert read.pattern() == expected
    slow = sum((weight[start : start + 4, column] != 0).sum() > 1 for column in range(16) for start in range(0, 64, 4))
    assert read.violations(NMPattern(1, 4)) == slow


def test_a_tail_shorter_than_m_is_counted_and_never_follows() -> None:
    weight = only_weight(layer("d = DequantizeLinear(w, t) y = MatMul(x, d)", np.ones((6, 1), np.int8)))
    assert weight.violations(NMPattern(1, 4)) == 2
    assert not weight.follows(NMPattern(3, 4))


def test_functions_are_inlined(tmp_path: Path) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[batch, 4] x) => (float[batch, 3] y) <float[4, 3] w = {text_of(W)}> {{ y = local.linear(x, w) }}
        <domain: "local", opset_import: ["" : 21]>
        linear (a, b) => (c) {{ c = MatMul(a, b) }}
    """
    ir.save(ir.from_onnx_text(text), tmp_path / "f.onnx")
    np.testing.assert_array_equal(only_weight(load_graph(tmp_path / "f.onnx")).matrix, W)


def test_a_graph_is_saved_whole_also_when_its_weights_lay_beside_it(tmp_path: Path) -> None:
    model = layer("y = MatMul(x, f)", W, more=f", float[64, 64] f = {text_of(np.eye(64))}", inputs="float[batch, 64] x")
    (tmp_path / "a").mkdir()
    ir.save(model, tmp_path / "a" / "model.onnx", external_data="model.onnx.data")
    assert (tmp_path / "a" / "model.onnx.data").stat().st_size > 0
    save_graph(load_graph(tmp_path / "a" / "model.onnx"), tmp_path / "one.onnx")
    assert [path.name for path in tmp_path.glob("one*")] == ["one.onnx"]
    np.testing.assert_array_equal(only_weight(load_graph(tmp_path / "one.onnx")).matrix, np.eye(64, dtype=np.float32))


class TestOnnxRuntimeFormats:
    """Files that ONNX Runtime's own quantizers make of a float graph with one 2:4 and one dense layer."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        rng = np.random.default_rng(0)
        sparse, dense = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(8, 8)).astype(np.float32)
        sparse[np.arange(16) % 4 < 2] = 0
        text = f"""
            g (float[batch, 16] x) => (float[batch, 8] y)
            <float[16, 8] sparse = {text_of(sparse)}, float[8, 8] dense = {text_of(dense)},
             float[8] b = {text_of(np.ones(8))}>
            {{ [one] m = MatMul(x, sparse) h = Add(m, b) r = Relu(h) [two] y = MatMul(r, dense) }}
        """
        return onnx_text.save(text, tmp_path_factory.mktemp("ort") / "float.onnx")

    def quantize(self, source: Path, out: Path, **options: Any) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
            def __init__(self) -> None:
                generator = np.random.default_rng(0)
                self.batches = iter([{"x": generator.normal(size=(4, 16)).astype(np.float32)} for _ in range(4)])

            def get_next(self) -> Any:
                return next(self.batches, None)

        quantize_static(source, out, Reader(), **options)
        return out

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("form", ["QDQ", "QOperator"])
    @pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
    def test_static(self, source: Path, tmp_path: Path, form: str, kind: str, per_channel: bool) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType

        options = {
            "quant_format": QuantFormat[form],
            "weight_type": QuantType[kind],
            "per_channel": per_channel,
            "activation_type": QuantType.QUInt8,
        }
        weights = {w.name: w for w in graph_weights(load_graph(self.quantize(source, tmp_path / "q.onnx", **options)))}
        self.check(weights, per_channel)
        assert {w.node.op_type for w in weights.values()} == {"QLinearMatMul" if form == "QOperator" else "MatMul"}

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
    def test_dynamic(self, source: Path, tmp_path: Path, kind: str, per_channel: bool) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(source, tmp_path / "q.onnx", weight_type=QuantType[kind], per_channel=per_channel)
        weights = {w.name: w for w in graph_weights(load_graph(tmp_path / "q.onnx"))}
        assert {w.node.op_type for w in weights.values()} == {"MatMulInteger"}
        assert all(w.scale_axis is None for w in weights.values())  # a later Mul scales
        self.check(weights, None)

    def test_what_the_runtime_fuses(self, source: Path, tmp_path: Path) -> None:
        """The optimized graph that ONNX Runtime runs has operators of its own, with the same weights."""
        import onnxruntime

        quantized = self.quantize(source, tmp_path / "q.onnx", per_channel=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        onnxruntime.InferenceSession(str(quantized), options, providers=["CPUExecutionProvider"])
        weights = {w.name: w for w in graph_weights(load_graph(tmp_path / "fused.onnx"))}
        assert {w.node.op_type for w in weights.values()} <= {"QLinearMatMul", "MatMulIntegerToFloat"}
        self.check(weights, True)

    def check(self, weights: dict[str, GraphWeight], per_channel: bool | None) -> None:
        assert len(weights) == 2
        sparse, dense = (
            next(w for name, w in weights.items() if name.startswith(kind)) for kind in ("sparse", "dense")
        )
        assert (sparse.k, sparse.n, sparse.is_quantized) == (16, 8, True)
        assert sparse.pattern() == PATTERN
        assert dense.pattern() is None
        if per_channel is not None:
            assert sparse.scale_axis == ("N" if per_channel else "tensor")


def test_polygraphy_finds_the_same_float_weights_sparse(tmp_path: Path) -> None:
    """Its checker knows float weights only (INT8 is skipped, and it always says PASSED); there we must agree."""
    pytest.importorskip("polygraphy", reason="comparing with polygraphy needs the extra `trt-rtx`")
    rng = np.random.default_rng(3)
    arrays: dict[str, np.ndarray] = {}
    for name in ("w0", "w1", "w2", "w3"):
        arrays[name] = rng.normal(size=(16, 16)).astype(np.float32)
    arrays["w1"][np.arange(16) % 4 >= 2] = 0  # along K of a MatMul
    arrays["w2"][:, np.arange(16) % 4 >= 2] = 0  # along N of a MatMul: not sparse
    arrays["w3"][:, np.arange(16) % 4 >= 2] = 0  # along K of a Gemm with transB
    declared = ", ".join(f"float[16, 16] {name} = {text_of(array)}" for name, array in arrays.items())
    nodes = "a = MatMul(x, w0) c = MatMul(a, w1) d = MatMul(c, w2) y = Gemm <transB = 1>(d, w3)"
    text = f"g (float[b, 16] x) => (float[b, 16] y) <{declared}> {{ {nodes} }}"
    file = onnx_text.save(text, tmp_path / "m.onnx")
    command = [sys.executable, "-c", "from polygraphy.tools import main; main()", "inspect", "sparsity", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = {name: kind == "sparse" for kind, name in re.findall(r"Found (sparse|non-sparse) tensor: (\w+)", report)}
    ours = {weight.name: weight.follows(PATTERN) for weight in graph_weights(load_graph(file))}
    assert ours == theirs == {"w0": False, "w1": True, "w2": False, "w3": True}
