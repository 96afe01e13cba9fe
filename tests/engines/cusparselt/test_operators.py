"""Every operator against ONNX Runtime, in a graph of its own; what shapes decide is told apart from what values do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engines.cusparselt.executor import MOST_SHAPES, Executor, _shape
from engines.cusparselt.lowering import lowered
from engines.cusparselt.operators import HOST, compute, known
from engines.cusparselt.program import Attribute, Step
from engines.cusparselt.stand_in import IntegerReferenceKernels
from nxm_export.errors import EngineError
from tests.support import onnx_text

FLOATS = "(float[2,s,8] x) => (float[a,b,c] y)"
INTEGERS = "(int64[2,s] i) => (int64[a,b] y)"
GRAPHS = {
    **{
        name: f"{FLOATS} {{ y = {name}(x) }}"
        for name in ("Abs", "Cos", "Erf", "Exp", "Neg", "Sigmoid", "Sin", "Tanh", "Relu", "Identity", "Gelu")
    },
    "Gelu tanh": FLOATS + ' { y = Gelu<approximate="tanh">(x) }',
    "Log, Sqrt": FLOATS + " { p = Abs(x) q = Sqrt(p) z = Exp(q) y = Log(z) }",
    "arithmetic": FLOATS + " <float k = {1.5}> { a = Add(x, k) b = Sub(a, x) d = Mul(b, x) y = Div(d, k) }",
    "Pow": FLOATS + " <float k = {3.0}> { y = Pow(x, k) }",
    "Div of integers": INTEGERS + " <int64 k = {-3}> { y = Div(i, k) }",
    "comparisons": INTEGERS
    + """ <int64 k = {7}, int64 one = {1}> { a = Equal(i, k) b = Less(i, k) d = Not(b) e = LessOrEqual(i, k)
        f = Greater(i, k) g = GreaterOrEqual(i, k) h = Or(a, d) j = And(e, g) l = Or(h, j) m = And(l, f)
        y = Where(m, i, one) }""",
    "extremes": FLOATS + " <float l = {-0.5}, float h = {0.5}> { a = Max(x, l) b = Min(a, h, x) y = Clip(b, l, h) }",
    "Cast": FLOATS + " { a = Cast<to=10>(x) b = Cast<to=7>(a) y = Cast<to=1>(b) }",
    "MatMul, Transpose": FLOATS + " { t = Transpose<perm=[0,2,1]>(x) z = MatMul(x, t) y = MatMul(z, x) }",
    "Reshape keeps sizes": FLOATS + " <int64[3] n = {0,-1,4}> { y = Reshape(x, n) }",
    "axes": FLOATS
    + " <int64[2] a1 = {1,-1}, int64[1] a2 = {1}> { u = Unsqueeze(x, a1) v = Squeeze(u, a1) y = Abs(v) }",
    "Expand both ways": FLOATS + " <int64[4] n = {3,2,1,1}, int64[1] z = {0}, int64 f = {0}>"
    " { e = Expand(x, n) y = Gather<axis=0>(e, f) }",
    "Concat, Split": FLOATS + " { a, b = Split<axis=2, num_outputs=2>(x) y = Concat<axis=-1>(b, a, x) }",
    "Split in unequal parts": FLOATS + " { a, b, d = Split<axis=2, num_outputs=3>(x) y = Concat<axis=2>(d, a, b) }",
    "Split by sizes": FLOATS + " <int64[2] n = {3,5}> { a, b = Split<axis=2>(x, n) y = Concat<axis=2>(b, a) }",
    "Slice": FLOATS + " <int64[2] f = {1,-7}, int64[2] t = {9,-1}, int64[2] a = {1,2}, int64[2] n = {1,2}>"
    " { y = Slice(x, f, t, a, n) }",
    "Gather": INTEGERS + " <int64[9,2] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}, int64 k = {-9}, int64 o = {1}>"
    " { n = Add(i, k) e = Gather<axis=0>(w, n) y = Gather<axis=2>(e, o) }",
    "GatherElements": FLOATS + " <int64[2,1,3] n = {7,0,3,1,1,2}> { y = GatherElements<axis=2>(x, n) }",
    "GatherND": INTEGERS + " <int64[2,3,2] n = {0,1,1,0,0,0,1,1,1,0,0,1}> { y = GatherND(i, n) }",
    "CumSum": INTEGERS + " <int64 a = {1}> { y = CumSum(i, a) }",
    "reductions": FLOATS + " <int64[1] a = {1}, int64[1] l = {-1}>"
    " { s = ReduceSum<keepdims=1>(x, a) m = ReduceMean<keepdims=1>(x, l) n = ReduceL2<keepdims=1>(x, l)"
    " t = Add(s, m) y = Add(t, n) }",
    "LayerNormalization": FLOATS + " <float[8] w = {1,2,3,4,5,6,7,8}, float[8] b = {8,7,6,5,4,3,2,1}>"
    " { y = LayerNormalization<axis=-1, epsilon=0.001>(x, w, b) }",
    "Softmax": FLOATS + " { y = Softmax<axis=1>(x) }",
    "Gemm": FLOATS + " <int64[2] n = {-1,8}, int64[3] o = {2,-1,2}, float[2,8] w = {1,2,3,4,5,6,7,8,8,7,6,5,4,3,2,1},"
    " float[2] b = {1,2}> { f = Reshape(x, n) g = Gemm<transB=1, alpha=0.5, beta=2.0>(f, w, b) y = Reshape(g, o) }",
    "quantizers": FLOATS + " <float k = {0.02}, int8 z = {0}, uint8 u = {128}, float[8] w = {1,2,3,4,5,6,7,8}>"
    " { q = QuantizeLinear(x, k, z) d = DequantizeLinear(q, k) p = QuantizeLinear(d, k, u)"
    " r = DequantizeLinear(p, k, u) y = Mul(r, w) }",
    "a quantizer without zero point": FLOATS + " <float k = {0.02}> { q = QuantizeLinear<output_dtype=3>(x, k)"
    " y = DequantizeLinear(q, k) }",
    "an unsigned quantizer without zero point": FLOATS
    + " <float k = {0.02}> { q = QuantizeLinear(x, k) y = DequantizeLinear(q, k) }",
    "quantizers of an axis": FLOATS + " <float[8] k = {0.01,0.02,0.03,0.04,0.05,0.06,0.07,0.08}, int8[8] z ="
    " {0,1,2,3,4,5,6,7}> { q = QuantizeLinear<axis=2>(x, k, z) y = DequantizeLinear<axis=2>(q, k, z) }",
    "what shapes decide": INTEGERS
    + """ <int64 zero = {0}, int64 one = {1}, int64[1] last = {1}, int64[1] none = {0}> {
        n = Shape<start=1>(i) m = Squeeze(n, none) r = Range(zero, m, one) k = Unsqueeze(r, none)
        s = Shape(i) f = ConstantOfShape<value = int64[1] {5}>(s) e = Add(f, k) y = Mul(e, i) }""",
    "a constant": INTEGERS + " { k = Constant<value = int64[1] {3}>() y = Mul(i, k) }",
}


def executor_of(text: str) -> Executor:
    made = lowered(onnx_text.model(f"g {text}"), "g.onnx")
    return Executor(made.program, made.tensors, IntegerReferenceKernels())


def feeds_of(executor: Executor, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    values: dict[str, np.ndarray] = {
        "x": random.standard_normal((2, length, 8)).astype(np.float32),
        "i": random.integers(1, 9, (2, length)),
    }
    return {binding.name: values[binding.name] for binding in executor.program.inputs}


@pytest.mark.parametrize("name", GRAPHS)
def test_an_operator_gives_what_onnx_runtime_gives(name: str) -> None:
    """At two lengths, each three times: planned, captured, replayed."""
    import torch

    executor = executor_of(GRAPHS[name])
    for length in (3, 6, 3, 6, 3):
        feeds = feeds_of(executor, length)
        expected = onnx_text.run(onnx_text.model(f"g {GRAPHS[name]}"), feeds)["y"]
        got = executor.run({key: torch.from_numpy(value) for key, value in feeds.items()})["y"]
        # Both in float32: sums of 8 and functions of one argument, by two libraries.
        np.testing.assert_allclose(got.numpy(), expected.astype(np.float32), rtol=2e-5, atol=2e-6)


def test_every_operator_that_is_said_to_be_known_is_tried() -> None:
    from engines.cusparselt.operators import _table
    from engines.cusparselt.program import ATTENTION, LINEAR

    tried = " ".join(GRAPHS.values())
    untried = {name for name in _table() if f"{name}(" not in tried and f"{name}<" not in tried}
    assert untried == {ATTENTION, LINEAR}
    assert all(known(name) for name in HOST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (INTEGERS + " { s = ReduceSum(i) y = Range(s, s, s) }", "Range .* depends on the values"),
        ("(float[2,s,8] x, int64[3] n) => (float[a,b,c] y) { y = Reshape(x, n) }", "Reshape .* depends on the values"),
    ],
)
def test_shapes_that_depend_on_values_are_refused(text: str, message: str) -> None:
    import torch

    executor = executor_of(text)
    feeds = {"x": torch.zeros(2, 3, 8), "n": torch.tensor([2, 3, 8]), "i": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(EngineError, match=message):
        executor.run({binding.name: feeds[binding.name] for binding in executor.program.inputs})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (FLOATS + " { z = Tan(x) y = Atan(z) }", "Atan, Tan"),
        (FLOATS + " { y = com.microsoft.Gelu(x) }", "com.microsoft::Gelu"),
        (FLOATS + " <float k = {0.02}> { q = QuantizeLinear<output_dtype=17>(x, k) y = DequantizeLinear(q, k) }", "17"),
    ],
)
def test_operators_that_are_not_known_are_named(text: str, named: str) -> None:
    with pytest.raises(EngineError, match=rf"^g.onnx: this engine does not know .*{named}.*--lowering matmul"):
        executor_of(text)


@pytest.mark.parametrize(
    ("op", "attribute", "value", "message"),
    [
        ("Softmax", "axis", "last", "Softmax: attribute axis must be a whole number, got 'last'"),
        ("LayerNormalization", "epsilon", (1,), r"LayerNormalization: attribute epsilon must be a number, got \(1,\)"),
        ("Gelu", "approximate", 1, "Gelu: attribute approximate must be a text, got 1"),
        ("Transpose", "perm", 0, "Transpose: attribute perm must be a list of whole numbers, got 0"),
    ],
)
def test_an_attribute_of_another_type_is_refused(op: str, attribute: str, value: Attribute, message: str) -> None:
    """A damaged program may hold any: none is dropped, and none gives a traceback."""
    x = torch.zeros(2, 3)
    with pytest.raises(EngineError, match=message):
        compute(op, [x, x[0]], {attribute: value})


def test_a_shape_from_what_is_no_axis_is_refused() -> None:
    step = Step("Shape", ("x",), ("y",), {"start": "first"})
    with pytest.raises(EngineError, match="Shape: attribute start must be a whole number, got 'first'"):
        _shape(torch.zeros(2, 3), step)


def test_as_many_shapes_are_kept_as_it_says(tmp_path: Path) -> None:
    import torch

    executor = executor_of(FLOATS + " { y = Abs(x) }")
    for length in range(1, MOST_SHAPES + 3):
        executor.run({"x": torch.ones(2, length, 8)})
    assert len(executor._plans) == MOST_SHAPES
    assert not executor.is_captured({"x": torch.ones(2, 1, 8)})
    executor.run({"x": torch.ones(2, MOST_SHAPES, 8)})
    assert executor.is_captured({"x": torch.ones(2, MOST_SHAPES, 8)})
