"""Quantize/dequantize pairs: the reference arithmetic, and graphs of pairs against integer arithmetic, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engines.ort.backend import unsigned_activations
from nxm_export.errors import ExportError
from nxm_export.graph.qdq import (
    dequantize,
    fold_float_weight,
    fold_weight_qdq,
    insert_activation_qdq,
    linears_of,
    quantize,
    require_scale,
)
from tests.support import onnx_text

# Scales are powers of two and values multiples of 1/4, so every float operation below is exact and the integer answer
# is the only right one. The inputs hold ties (x.5 steps round to the even code) and values beyond both ends of the
# range.
X = np.array(
    [[0.25, 0.75, 1.25, -0.25, -0.75, 3.5, -64.25, 100.0], [63.5, 63.75, -64.0, 64.0, 0.0, 0.5, -0.5, 2.25]], np.float32
)
CODES = np.array([[1, 0, 3, 0, 5, 0, -7, 0], [0, 2, 0, -4, 0, 6, 0, 127]], np.int8)  # (out, in)
SX, SW, B = 0.5, np.array([0.5, 0.25], np.float32), np.array([1.0, -1.0], np.float32)

QDQ = """
    g (float[batch, 8] x) => (float[batch, 2] y)
    <float sx = {0.5}, int8 zx = {0},
     int8[8, 2] w = {1,0, 0,2, 3,0, 0,-4, 5,0, 0,6, -7,0, 0,127}, float[2] sw = {0.5, 0.25}, int8[2] zw = {0, 0},
     float[2] b = {1.0, -1.0}>
    {
      xq = QuantizeLinear(x, sx, zx)
      xd = DequantizeLinear(xq, sx, zx)
      wd = DequantizeLinear <axis = 1>(w, sw, zw)
      m = MatMul(xd, wd)
      y = Add(m, b)
    }
"""
FLOAT = """
    g (float[batch, 8] x) => (float[batch, 2] y)
    <float[2, 8] weight = {0.5,0,1.5,0,2.5,0,-3.5,0, 0,0.5,0,-1.0,0,1.5,0,31.75}, float[2] b = {1.0, -1.0}>
    {
      t = Transpose <perm = [1, 0]>(weight)
      [product] m = MatMul(x, t)
      y = Add(m, b)
    }
"""


def by_integers(x: np.ndarray) -> np.ndarray:
    """The layer in Python integers: codes by exact rational rounding, an exact sum, and one scaling at the end."""
    from fractions import Fraction

    rows = []
    for row in x:
        codes = [max(-128, min(127, round(Fraction(float(v)) / Fraction(SX)))) for v in row]  # round() ties to even
        sums = [sum(c * int(w) for c, w in zip(codes, channel, strict=True)) for channel in CODES]
        rows.append([float(Fraction(s) * Fraction(SX) * Fraction(float(k)) + Fraction(float(b)))
                     for s, k, b in zip(sums, SW, B, strict=True)])  # fmt: skip
    return np.array(rows, np.float32)


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "fused"])
def test_a_graph_of_pairs_computes_what_integers_compute(optimize: bool) -> None:
    actual = onnx_text.run(onnx_text.model(QDQ), {"x": X}, optimize=optimize)["y"]
    np.testing.assert_array_equal(actual, by_integers(X))


def test_the_reference_arithmetic_computes_what_integers_compute() -> None:
    x = dequantize(quantize(X, SX), SX)
    w = dequantize(CODES, SW[:, None])
    np.testing.assert_array_equal(x @ w.T + B, by_integers(X))


def test_our_edits_make_the_graph_that_integers_compute() -> None:
    model = onnx_text.model(FLOAT)
    (linear,) = linears_of(model.graph, "weight")
    assert (linear.product.name, linear.x.name, linear.output.name) == ("product", "x", "y")
    fold_weight_qdq(model.graph, linear, "weight", CODES, SW)
    insert_activation_qdq(model.graph, linear.x, np.array(SX, np.float32), "product.input", [linear.product])
    passes.RemoveUnusedNodesPass()(model)
    for optimize in (False, True):
        np.testing.assert_array_equal(onnx_text.run(model, {"x": X}, optimize=optimize)["y"], by_integers(X))
    kinds = sorted(node.op_type for node in model.graph)
    assert kinds == ["Add", "DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear"]
    stored = model.graph.initializers["weight_quantized"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), CODES.T)  # (K, N), as the MatMul reads it
    assert "weight" not in {value.name for node in model.graph for value in node.inputs if value}


def test_an_output_pair_goes_behind_the_bias_for_all_readers() -> None:
    text = FLOAT.replace("y = Add(m, b)", "z = Add(m, b)\n y0 = Relu(z)\n y = Add(y0, z)")
    model = onnx_text.model(text)
    (linear,) = linears_of(model.graph, "weight")
    restored = insert_activation_qdq(model.graph, linear.output, np.array(2.0, np.float32), "product.output")
    assert {user.op_type for user in linear.output.consumers()} == {"QuantizeLinear"}
    assert {user.op_type for user in restored.consumers()} == {"Relu", "Add"}
    z = dequantize(quantize(X @ (CODES * SW[:, None]).T + B, 2.0), 2.0)
    np.testing.assert_array_equal(onnx_text.run(model, {"x": X})["y"], np.maximum(z, 0) + z)


def test_a_float_weight_is_stored_as_its_product_reads_it_under_its_own_name() -> None:
    model = onnx_text.model(FLOAT)
    before = onnx_text.run(model, {"x": X})["y"]
    linears_of(model.graph, "weight")
    fold_float_weight(model.graph, "weight")
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert list(model.graph.initializers["weight"].shape or []) == [8, 2]
    np.testing.assert_array_equal(onnx_text.run(model, {"x": X})["y"], before)


def test_layers_that_share_a_weight_share_what_is_stored() -> None:
    text = FLOAT.replace(
        "y = Add(m, b)", "u = Transpose <perm = [1, 0]>(weight)\n m2 = MatMul(x, u)\n s = Add(m, m2)\n y = Add(s, b)"
    )
    quantized, folded = onnx_text.model(text), onnx_text.model(text)
    before = onnx_text.run(quantized, {"x": X})["y"]
    both = linears_of(quantized.graph, "weight")
    assert len(both) == 2
    for linear in both:
        fold_weight_qdq(quantized.graph, linear, "weight", CODES, SW)
    fold_float_weight(folded.graph, "weight")
    for model in (quantized, folded):
        np.testing.assert_array_equal(onnx_text.run(model, {"x": X})["y"], before)
    assert sum(node.op_type == "DequantizeLinear" for node in quantized.graph) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("float[2, 8] weight", "float[2, 8] wait"), "has no initializer weight"),
        (("perm = [1, 0]", "perm = [0, 1]"), "weight feeds Transpose"),
        (("Transpose <perm = [1, 0]>(weight)", "Neg(weight)"), "weight feeds Neg"),
        (
            ("m = MatMul(x, t)", "m = Gemm(x, t)"),
            "weight feeds Gemm node 'product'; expected the right side of a MatMul",
        ),
        (("m = MatMul(x, t)", "u = Transpose(x) m = MatMul(t, u)"), "expected the right side of a MatMul"),
        (("m = MatMul(x, t)", "m = Identity(b)"), "weight is not multiplied by anything"),
    ],
)
def test_a_weight_in_any_other_use_is_refused(change: tuple[str, str], message: str) -> None:
    """A guess by shape could swap query and key without anybody noticing."""
    text = FLOAT.replace(*change)
    if change[0].startswith("float"):
        text = text.replace("(weight)", "(wait)")
    with pytest.raises(ExportError, match=message.replace("(", r"\(")):
        linears_of(onnx_text.model(text).graph, "weight")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, "subnormal"])
def test_a_scale_must_be_a_normal_number_of_its_dtype(dtype: str, bad: Any) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    smallest = float(ml_dtypes.finfo(kind).smallest_normal)  # type: ignore[no-untyped-call]
    require_scale(np.array([1.0, smallest], kind), "w")
    value = smallest / 2 if bad == "subnormal" else bad
    with pytest.raises(
        ExportError, match=rf"w: scale .* is not a normal {dtype} number .* compress again with fewer bits"
    ):
        require_scale(np.array([1.0, value], kind), "w")


QUANTIZE = """
    g (KIND[n] x, KIND s) => (int8[n] q, KIND[n] d)
    <int8 z = {0}>
    { q = QuantizeLinear(x, s, z)   d = DequantizeLinear(q, s, z) }
"""
_float32 = st.floats(-1e4, 1e4, width=32)


@given(hnp.arrays(np.float32, 32, elements=_float32), st.floats(2**-10, 8, width=32))
def test_reference_and_runtime_quantize_alike(x: np.ndarray, scale: float) -> None:
    actual = onnx_text.run(
        onnx_text.model(QUANTIZE.replace("KIND", "float")), {"x": x, "s": np.array(scale, np.float32)}
    )
    np.testing.assert_array_equal(actual["q"], quantize(x, np.float32(scale)))
    np.testing.assert_array_equal(actual["d"], dequantize(actual["q"], np.float32(scale)))


@given(hnp.arrays(np.float16, 32, elements=st.floats(-1000, 1000, width=16)), st.floats(2**-6, 8, width=16))
def test_reference_and_runtime_quantize_alike_in_half_precision(x: np.ndarray, scale: float) -> None:
    actual = onnx_text.run(
        onnx_text.model(QUANTIZE.replace("KIND", "float16")), {"x": x, "s": np.array(scale, np.float16)}
    )
    np.testing.assert_array_equal(actual["q"], quantize(x, np.float16(scale)))
    np.testing.assert_array_equal(actual["d"], dequantize(actual["q"], np.float16(scale), np.float16))


class TestUnsigned:
    """The rewrite to UINT8 activations that the ``ort`` backend makes at build."""

    @given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-100, 100, width=32)))
    def test_it_changes_no_bit(self, x: np.ndarray) -> None:
        signed, unsigned = onnx_text.model(QDQ), onnx_text.model(QDQ)
        assert unsigned_activations(unsigned) == 1
        expected = onnx_text.run(signed, {"x": x})["y"]
        for optimize in (False, True):
            # Sums of products of codes below 2**24 are exact in float32, so fused integers must agree as well.
            np.testing.assert_array_equal(onnx_text.run(unsigned, {"x": x}, optimize=optimize)["y"], expected)

    def test_codes_and_zero_point_move_by_128_and_the_weight_stays(self) -> None:
        model = onnx_text.model(QDQ)
        unsigned_activations(model)
        q = next(node for node in model.graph if node.op_type == "QuantizeLinear")
        zeros = [node.inputs[2].const_value.numpy() for node in (q, *q.outputs[0].consumers())]  # type: ignore[union-attr]
        assert all(zero.dtype == np.uint8 and zero == 128 for zero in zeros)
        assert str(model.graph.initializers["w"].dtype) == "INT8"
        assert q.outputs[0].dtype == ir.DataType.UINT8

    @pytest.mark.parametrize(
        "change",
        [
            ("int8 zx = {0}", "int8 zx = {3}"),
            ("int8 zx = {0}", "uint8 zx = {0}"),
            ("QuantizeLinear(x, sx, zx)", "QuantizeLinear(x, sx)"),
            ("y = Add(m, b)", "c = Cast <to = 1>(xq) r = ReduceSum <keepdims = 1>(c) e = Add(m, b) y = Add(e, r)"),
        ],
        ids=["asymmetric", "unsigned", "no zero point", "codes read by another node"],
    )
    def test_what_it_could_not_keep_exact_is_left_alone(self, change: tuple[str, str]) -> None:
        text = QDQ.replace(*change)
        if "uint8" in change[1]:
            text = text.replace("xq, sx, zx", "xq, sx, zx")
        if change[1].endswith("(x, sx)"):
            text = text.replace("DequantizeLinear(xq, sx, zx)", "DequantizeLinear(xq, sx)")
        model = onnx_text.model(text)
        before = onnx_text.run(model, {"x": X})["y"]
        assert unsigned_activations(model) == 0
        np.testing.assert_array_equal(onnx_text.run(model, {"x": X})["y"], before)

    def test_a_zero_point_that_a_dequantizer_leaves_out_is_0(self) -> None:
        model = onnx_text.model(QDQ.replace("DequantizeLinear(xq, sx, zx)", "DequantizeLinear(xq, sx)"))
        before = onnx_text.run(model, {"x": X})["y"]
        assert unsigned_activations(model) == 1
        np.testing.assert_array_equal(onnx_text.run(model, {"x": X})["y"], before)

    def test_codes_that_leave_the_graph_stay_signed(self) -> None:
        text = QDQ.replace("=> (float[batch, 2] y)", "=> (float[batch, 2] y, int8[batch, 8] xq)")
        assert unsigned_activations(onnx_text.model(text)) == 0
