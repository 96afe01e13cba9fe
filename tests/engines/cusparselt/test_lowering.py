"""Which products become products of integers, and that what differs in anything is computed as the graph says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.cusparselt.executor import Executor
from engines.cusparselt.lowering import Lowered, lowered
from engines.cusparselt.program import ATTENTION, LINEAR, PRODUCT, program_of, tensors_of, to_bytes
from engines.cusparselt.stand_in import IntegerReferenceKernels
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.graph.reading.graph_weights import load_graph
from tests.support import baked, onnx_text, tiny
from tests.support.variants import variants

WEIGHT = "{1,0,2,0,0,-3,4,0,5,0,0,6,0,0,7,8,1,0,2,0,0,-3,4,0,5,0,0,6,0,0,7,8}"  # (8, 4), by rows
HEAD = (
    "g (float[2,s,8] x) => (float[2,s,4] y) <float s = {0.02}, int8 z = {0}, float[4] ws = {0.1,0.2,0.3,0.4},"
    f" float[4] b = {{1,2,3,4}}, float o = {{0.05}}, int8[8,4] w = {WEIGHT}> "
)
PAIR = "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=1>(w, ws) "
FORMS = {
    "a product": ("{ " + PAIR + "y = MatMul(a, v) }", ("float32", False)),
    "with a bias": ("{ " + PAIR + "p = MatMul(a, v) y = Add(b, p) }", ("float32", True)),
    "to INT8": (
        "{ " + PAIR + "p = MatMul(a, v) t = Add(p, b) r = QuantizeLinear(t, o, z) y = DequantizeLinear(r, o, z) }",
        ("int8", True),
    ),
    "with an activation before the quantizer": (
        "{ " + PAIR + "p = MatMul(a, v) t = Relu(p) r = QuantizeLinear(t, o, z) y = DequantizeLinear(r, o, z) }",
        ("float32", False),
    ),
    "quantized, and read in float": (
        "{ " + PAIR + "p = MatMul(a, v) r = QuantizeLinear(p, o, z) d = DequantizeLinear(r, o, z) y = Add(d, p) }",
        ("float32", False),
    ),
    "added to itself": ("{ " + PAIR + "p = MatMul(a, v) y = Add(p, p) }", ("float32", False)),
    "with an addend of another shape": (
        "{ " + PAIR + "p = MatMul(a, v) t = Add(p, o) y = Abs(t) }",
        ("float32", False),
    ),
    "gemm": (
        "<int64[2] n = {-1,8}, int64[3] m = {2,-1,4}> { f = Reshape(x, n) q = QuantizeLinear(f, s, z)"
        " a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=1>(w, ws) p = Gemm(a, v, b) y = Reshape(p, m) }",
        ("float32", True),
    ),
    "gemm with a turned weight": (
        f"<int64[2] n = {{-1,8}}, int64[3] m = {{2,-1,4}}, int8[4,8] u = {WEIGHT}> {{ f = Reshape(x, n)"
        " q = QuantizeLinear(f, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=0>(u, ws)"
        " p = Gemm<transB=1>(a, v, b) y = Reshape(p, m) }",
        ("float32", True),
    ),
    "its channels counted from the end": (
        "{ q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=-1>(w, ws)"
        " y = MatMul(a, v) }",
        ("float32", False),
    ),
    "its channels where ONNX has them": (
        "{ q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear(w, ws) y = MatMul(a, v) }",
        ("float32", False),
    ),
    "one scale for all channels": (
        "{ q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=0>(w, s)"
        " y = MatMul(a, v) }",
        ("float32", False),
    ),
    "without zero points, to INT8 by name": (
        "{ q = QuantizeLinear<output_dtype=3>(x, s) a = DequantizeLinear(q, s) v = DequantizeLinear<axis=1>(w, ws)"
        " p = MatMul(a, v) r = QuantizeLinear<output_dtype=3>(p, o) y = DequantizeLinear(r, o) }",
        ("int8", False),
    ),
    "to UINT8": (
        "<uint8 u = {7}> { " + PAIR + "p = MatMul(a, v) r = QuantizeLinear(p, o, u) y = DequantizeLinear(r, o, u) }",
        ("float32", False),
    ),
    "to INT8 with a zero point": (
        "<int8 u = {7}> { " + PAIR + "p = MatMul(a, v) r = QuantizeLinear(p, o, u) y = DequantizeLinear(r, o, u) }",
        ("float32", False),
    ),
    "to INT8 with a scale for each channel": (
        "<int8[4] u = {0,0,0,0}> { " + PAIR + "p = MatMul(a, v) r = QuantizeLinear<axis=2>(p, ws, u)"
        " y = DequantizeLinear<axis=2>(r, ws, u) }",
        ("float32", False),
    ),
}
FLOATS = {
    "a constant activation": "<int8[2,1,8] k = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}> { d = DequantizeLinear(k, s, z)"
    " v = DequantizeLinear<axis=1>(w, ws) f = MatMul(d, v) t = MatMul(x, v) y = Add(t, f) }",
    "an activation with a scale for each channel": "<float[8] k = {0.01,0.02,0.03,0.04,0.05,0.06,0.07,0.08},"
    " int8[8] kz = {0,0,0,0,0,0,0,0}> { q = QuantizeLinear<axis=2>(x, k, kz) a = DequantizeLinear<axis=2>(q, k, kz)"
    " v = DequantizeLinear<axis=1>(w, ws) y = MatMul(a, v) }",
    "an activation that is unsigned where nothing is said": "{ q = QuantizeLinear(x, s) a = DequantizeLinear(q, s)"
    " v = DequantizeLinear<axis=1>(w, ws) y = MatMul(a, v) }",
    "a gemm with a part of its bias": "<int64[2] n = {-1,8}, int64[3] m = {2,-1,4}> { f = Reshape(x, n)"
    " q = QuantizeLinear(f, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=1>(w, ws)"
    " p = Gemm<beta=0.5>(a, v, b) y = Reshape(p, m) }",
    "a gemm of a turned activation": "<int64[2] n = {-1,8}, int64[3] m = {2,-1,4}> { f = Reshape(x, n)"
    " t = Transpose(f) q = QuantizeLinear(t, s, z) a = DequantizeLinear(q, s, z)"
    " v = DequantizeLinear<axis=1>(w, ws) p = Gemm<transA=1>(a, v, b) y = Reshape(p, m) }",
    "a float activation": "{ v = DequantizeLinear<axis=1>(w, ws) y = MatMul(x, v) }",
    "an unsigned activation": "<uint8 u = {7}> { q = QuantizeLinear(x, s, u) a = DequantizeLinear(q, s, u)"
    " v = DequantizeLinear<axis=1>(w, ws) y = MatMul(a, v) }",
    "an activation with a zero point": "<int8 u = {7}> { q = QuantizeLinear(x, s, u) a = DequantizeLinear(q, s, u)"
    " v = DequantizeLinear<axis=1>(w, ws) y = MatMul(a, v) }",
    "a weight with a zero point": "<int8[4] u = {0,0,1,0}> { q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
    " v = DequantizeLinear<axis=1>(w, ws, u) y = MatMul(a, v) }",
    "scales along K": "<float[8] k = {1,2,3,4,5,6,7,8}> { q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
    " v = DequantizeLinear<axis=0>(w, k) y = MatMul(a, v) }",
    "a gemm with factors": "<int64[2] n = {-1,8}, int64[3] m = {2,-1,4}> { f = Reshape(x, n)"
    " q = QuantizeLinear(f, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear<axis=1>(w, ws)"
    " p = Gemm<alpha=0.5>(a, v, b) y = Reshape(p, m) }",
    "a gemm with one bias for all channels": "<int64[2] n = {-1,8}, int64[3] m = {2,-1,4}, float[1] one = {3}>"
    " { f = Reshape(x, n) q = QuantizeLinear(f, s, z) a = DequantizeLinear(q, s, z)"
    " v = DequantizeLinear<axis=1>(w, ws) p = Gemm(a, v, one) y = Reshape(p, m) }",
}


def graph_of(text: str) -> str:
    if not text.startswith("<"):
        return HEAD + text
    return HEAD.rstrip().removesuffix(">") + ", " + text[1 : text.index("> {")] + "> " + text[text.index("> {") + 2 :]


def outputs(made: Lowered, x: np.ndarray, name: str = "y") -> np.ndarray:
    import torch

    executor = Executor(made.program, made.tensors, IntegerReferenceKernels())
    return executor.run({"x": torch.from_numpy(x)})[name].numpy()


@pytest.mark.parametrize("name", [*FORMS, *FLOATS])
def test_a_graph_gives_what_onnx_runtime_gives(name: str) -> None:
    text = graph_of(FORMS[name][0] if name in FORMS else FLOATS[name])
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    made = lowered(onnx_text.model(text), "g.onnx")
    expected = onnx_text.run(onnx_text.model(text), {"x": x})["y"]
    # Exact sums here, float32 ones there; a code that lies on a half may go one step (0.05) the other way.
    off = np.abs(outputs(made, x) - expected)
    assert off.max() <= 0.0501
    assert (off > 1e-5).mean() <= 0.03
    products = list(made.program.products.values())
    if name in FORMS:
        assert [(product.output, product.bias is not None) for product in products] == [FORMS[name][1]]
    else:
        assert not products


def test_a_product_is_named_by_its_weight_and_nothing_is_kept_that_no_step_reads() -> None:
    text = graph_of(
        "<float[9] unread = {1,2,3,4,5,6,7,8,9}> { " + PAIR + "dead = Abs(x) p = MatMul(a, v) y = Add(b, p) }"
    )
    made = lowered(onnx_text.model(text), "g.onnx")
    (product,) = made.program.products.values()
    assert (product.name, product.k, product.n) == ("w", 8, 4)
    assert set(made.tensors) == {"s", "z", product.weight, product.alpha, product.bias}
    assert [step.op for step in made.program.steps] == ["QuantizeLinear", PRODUCT]


def test_what_is_an_output_of_the_graph_is_given_though_a_product_could_hold_it() -> None:
    """A bias or a quantizer behind it is no part of the product then."""
    for behind in ("y = Add(p, b)", "r = QuantizeLinear(p, o, z) y = DequantizeLinear(r, o, z)"):
        text = graph_of("{ " + PAIR + "p = MatMul(a, v) " + behind + " }").replace(
            "[2,s,4] y)", "[2,s,4] y, float[2,s,4] p)"
        )
        x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
        expected = onnx_text.run(onnx_text.model(text), {"x": x})
        made = lowered(onnx_text.model(text), "g.onnx")
        for name in ("p", "y"):
            np.testing.assert_allclose(outputs(made, x, name), expected[name], atol=1e-5)
        assert made.program.outputs == ("y", "p")


@pytest.mark.parametrize(
    "body",
    [
        "c = Constant<value = float {2}>() y = Mul(x, c)",
        "c = Constant<value_float = 2.5>() y = Mul(x, c)",
        "c = Constant<value_floats = [1.5,2.5,3.5,4.5,5.5,6.5,7.5,8.5]>() y = Mul(x, c)",
        "c = Constant<value_int = 3>() d = Cast<to=1>(c) y = Mul(x, d)",
        "c = Constant<value_ints = [2,8,-1]>() y = Reshape(x, c)",
    ],
)
def test_a_constant_may_be_a_node_in_every_form(body: str) -> None:
    text = "g (float[2,s,8] x) => (float[2,s,8] y) { " + body + " }"
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    expected = onnx_text.run(onnx_text.model(text), {"x": x})["y"]
    assert np.array_equal(outputs(lowered(onnx_text.model(text), "g.onnx"), x), expected)


@pytest.mark.parametrize(
    ("body", "unknown"),
    [
        ('c = Constant<value_string = "a">() y = Identity(x)', "Constant with value_string"),
        ('y, h, e = LSTM<activations=["Sigmoid","Tanh","Tanh"], hidden_size=8>(x, w, w)', "LSTM with activations"),
        ("q = QuantizeLinear<output_dtype=5>(x, s) y = DequantizeLinear(q, s)", "QuantizeLinear to the element type 5"),
        ("q = QuantizeLinear<axis=2, block_size=4>(x, k) y = DequantizeLinear(q, s)", "QuantizeLinear in blocks"),
        ("y = com.microsoft.Gelu(x)", "com.microsoft::Gelu"),
        ("t = Sinh(x) u = Cosh(t) y = Abs(u)", "Cosh, Sinh"),
    ],
)
def test_what_is_not_known_here_is_refused_by_name(body: str, unknown: str) -> None:
    text = (
        "g (float[2,s,8] x) => (float[2,s,8] y) <float s = {0.1}, float[8,8,8] w = {" + ",".join(["0"] * 512) + "},"
        " float[2,s,2] k> { " + body + " }"
    )
    with pytest.raises(EngineError, match=rf"g\.onnx: this engine does not know {unknown}; export it with"):
        lowered(onnx_text.model(text), "g.onnx")


def test_a_weight_in_blocks_is_no_product_and_refused() -> None:
    text = "<float[2,4] k = {1,2,3,4,5,6,7,8}> { q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
    text += " v = DequantizeLinear<axis=0, block_size=4>(w, k) y = MatMul(a, v) }"
    with pytest.raises(EngineError, match="this engine does not know DequantizeLinear in blocks"):
        lowered(onnx_text.model(graph_of(text)), "g.onnx")


QKV = (
    "g (float[2,3,s,8] q, float[2,3,8,t] k, float[2,3,t,8] v, float[2,1,1,t] m, float[1,3,s,t] e)"
    " => (float[2,3,s,8] y) <float two = {2}, float[3,1,1] each = {1,2,3}, float none = {0}, float one = {1}> { "
)


@pytest.mark.parametrize(
    ("body", "fused", "scale", "biases"),
    [
        ("a = MatMul(q, k) w = Softmax<axis=-1>(a) y = MatMul(w, v)", True, 1.0, ""),
        ("a = MatMul(q, k) w = Softmax(a) y = MatMul(w, v)", True, 1.0, ""),
        ("a = MatMul(q, k) w = Softmax<axis=3>(a) y = MatMul(w, v)", True, 1.0, ""),
        ("a = MatMul(q, k) w = Softmax<axis=2>(a) y = MatMul(w, v)", False, 0, ""),
        ("a = MatMul(q, k) b = Mul(a, two) w = Softmax<axis=-1>(b) y = MatMul(w, v)", True, 2.0, ""),
        ("a = MatMul(q, k) b = Div(a, two) w = Softmax<axis=-1>(b) y = MatMul(w, v)", True, 0.5, ""),
        ("a = MatMul(q, k) b = Mul(two, a) w = Softmax<axis=-1>(b) y = MatMul(w, v)", False, 0, ""),
        ("a = MatMul(q, k) b = Mul(a, each) w = Softmax<axis=-1>(b) y = MatMul(w, v)", False, 0, ""),
        ("a = MatMul(q, k) b = Mul(a, none) w = Softmax<axis=-1>(b) y = MatMul(w, v)", False, 0, ""),
        ("a = MatMul(q, k) b = Add(a, m) w = Softmax<axis=-1>(b) y = MatMul(w, v)", True, 1.0, "m"),
        ("a = MatMul(q, k) b = Add(m, a) w = Softmax<axis=-1>(b) y = MatMul(w, v)", True, 1.0, "m"),
        (
            "a = MatMul(q, k) b = Div(a, two) c = Add(b, e) d = Add(m, c) w = Softmax<axis=-1>(d) y = MatMul(w, v)",
            True,
            0.5,
            "me",
        ),
        # What is scaled again behind a bias, added to itself, of three axes or read twice is in parts.
        (
            "a = MatMul(q, k) b = Add(a, m) c = Mul(b, two) w = Softmax<axis=-1>(c) y = MatMul(w, v)",
            False,
            0,
            "",
        ),
        ("a = MatMul(q, k) b = Add(a, a) w = Softmax<axis=-1>(b) y = MatMul(w, v)", False, 0, ""),
        ("b = Add(m, e) w = Softmax<axis=-1>(b) y = MatMul(w, v)", False, 0, ""),
        (
            "a = MatMul(q, k) w = Softmax<axis=-1>(a) u = MatMul(w, v) t = MatMul(w, v) y = Add(u, t)",
            False,
            0,
            "",
        ),
        (
            "a = MatMul(q, k) w = Softmax<axis=-1>(a) u = MatMul(w, v) t = MatMul(a, v) y = Add(u, t)",
            False,
            0,
            "",
        ),
    ],
)
def test_attention_is_fused_in_the_forms_that_it_has_and_computes_what_the_graph_says(
    body: str, fused: bool, scale: float, biases: str
) -> None:
    import torch

    rng = np.random.default_rng(0)
    shapes = {"q": (2, 3, 5, 8), "k": (2, 3, 8, 7), "v": (2, 3, 7, 8), "m": (2, 1, 1, 7), "e": (1, 3, 5, 7)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = onnx_text.model(QKV + body + " }")
    infer_ranks(model)
    made = lowered(model, "g.onnx")
    attention = [step for step in made.program.steps if step.op == ATTENTION]
    assert made.program.attention == {
        "fused": int(fused),
        "in parts": int(not fused),
        "operands on their INT8 grid": 0,
    }
    assert [(step.attributes["scale"], step.inputs) for step in attention] == [
        (scale, ("q", "k", "v", *biases)) for _ in range(fused)
    ]
    executor = Executor(made.program, made.tensors, IntegerReferenceKernels())
    ours = executor.run({name: torch.from_numpy(array) for name, array in feeds.items()})["y"].numpy()
    expected = onnx_text.run(onnx_text.model(QKV + body + " }"), feeds)["y"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rounded", "counted"), [("", 0), ("q", 1), ("v", 1), ("qkv", 1)])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_said_to_be_on_integers_where_any_operand_is(rounded: str, counted: int, fused: bool) -> None:
    pairs = "".join(
        f"c{name} = QuantizeLinear({name}, grid, zero) r{name} = DequantizeLinear(c{name}, grid, zero) "
        for name in rounded
    )
    q, k, v = (f"r{name}" if name in rounded else name for name in "qkv")
    softmax = "a" if fused else "Mul(two, a)"
    body = f"a = MatMul({q}, {k}) " + ("" if fused else f"b = {softmax} ")
    body += f"w = Softmax<axis=-1>({'a' if fused else 'b'}) y = MatMul(w, {v}) }}"
    model = onnx_text.model(QKV.replace("one = {1}", "one = {1}, float grid = {0.1}, int8 zero = {0}") + pairs + body)
    infer_ranks(model)
    parts = {"fused": int(fused), "in parts": int(not fused)}
    # In parts, the product of the probabilities has its two operands looked at, not those of the scores.
    seen = counted if fused or "v" in rounded else 0
    assert lowered(model, "g.onnx").program.attention == parts | {"operands on their INT8 grid": seen}


def test_attention_that_multiplies_its_probabilities_by_themselves_is_in_parts() -> None:
    """They are read twice by one product, which left nothing to read."""
    import torch

    text = (
        "g (float[1,2,4,8] q, float[1,2,8,4] k) => (float[1,2,4,4] y)"
        " { a = MatMul(q, k) w = Softmax<axis=-1>(a) y = MatMul(w, w) }"
    )
    rng, model = np.random.default_rng(0), onnx_text.model(text)
    feeds = {name: rng.standard_normal(s).astype(np.float32) for name, s in (("q", (1, 2, 4, 8)), ("k", (1, 2, 8, 4)))}
    infer_ranks(model)
    made = lowered(model, "g.onnx")
    executor = Executor(made.program, made.tensors, IntegerReferenceKernels())
    ours = executor.run({name: torch.from_numpy(array) for name, array in feeds.items()})["y"].numpy()
    np.testing.assert_allclose(ours, onnx_text.run(onnx_text.model(text), feeds)["y"], rtol=1e-4, atol=1e-5)


def infer_ranks(model: Any) -> None:
    """Let every value have as many axes as it has, as the exporter leaves a graph."""
    import onnx
    import onnx_ir as ir

    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    shapes = {value.name: value.shape for node in inferred.graph for value in node.outputs}
    types = {value.name: value.type for node in inferred.graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.type = shapes[value.name], types[value.name]


SQUARE = (
    "g (float[s,4] x) => (float[s,4] y) <float s = {0.02}, int8 z = {0}, float[4] ws = {0.1,0.2,0.3,0.4},"
    " int8[4,4] w = {1,0,2,0,0,-3,4,0,5,0,0,6,0,0,7,8}, int8[4,4] w_quantized = {9,8,7,6,0,0,0,0,1,2,3,4,0,0,0,0},"
    " float[4] factors = {3,1,4,1}> { q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) "
)
COLLIDING = {
    "one weight, read by rows and by columns": "v = DequantizeLinear<axis=1>(w, ws) u = DequantizeLinear<axis=0>(w, ws)"
    " b = MatMul(a, v) c = Gemm<transB=1>(a, u) y = Sub(b, c) }",
    "two weights, one named after its codes": "v = DequantizeLinear<axis=1>(w, ws)"
    " u = DequantizeLinear<axis=1>(w_quantized, ws) b = MatMul(a, v) c = MatMul(a, u) y = Sub(b, c) }",
    "a constant that is named like a product's scale": "v = DequantizeLinear<axis=1>(w, ws) b = MatMul(a, v)"
    " y = Mul(b, factors) }",
}


@pytest.mark.parametrize("name", COLLIDING)
def test_names_that_meet_change_no_number(name: str) -> None:
    model = onnx_text.model(SQUARE + COLLIDING[name])
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            node.name = "a" if node.outputs[0].name == "b" else "other"
    model.graph.initializers["factors"].name = "a.alpha"
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    expected = onnx_text.run(model, {"x": x})["y"]
    assert np.abs(outputs(lowered(model, "g.onnx"), x) - expected).max() <= 1e-5  # float32 sums of a few terms


def test_two_products_of_one_name_are_refused() -> None:
    """The second took the place of the first, and both gave its result."""
    model = onnx_text.model(SQUARE + COLLIDING["two weights, one named after its codes"])
    for node in model.graph:
        node.name = "same"
    with pytest.raises(EngineError, match=r"g\.onnx: two products are named 'same'.*give every node a name of its own"):
        lowered(model, "g.onnx")


def test_a_product_is_two_four_by_its_codes_along_k() -> None:
    two_four = graph_of(FORMS["a product"][0])
    assert not lowered(onnx_text.model(two_four), "g").program.products[next(iter(_names(two_four)))].two_four
    columns = "{1,1,1,1,2,2,2,2,0,0,0,0,0,0,0,0,3,3,3,3,0,0,0,0,0,0,0,0,4,4,4,4}"
    along_k = two_four.replace(WEIGHT, columns)
    assert lowered(onnx_text.model(along_k), "g").program.products[next(iter(_names(along_k)))].two_four


def _names(text: str) -> list[str]:
    return list(lowered(onnx_text.model(text), "g").program.products)


@pytest.mark.parametrize(
    ("body", "fused"),
    [
        ("p = MatMul(x, m) y = Add(p, b)", True),
        ("p = MatMul(x, m) y = Add(b, p)", True),
        ("p = MatMul(x, m) y = Add(p, s)", False),
        ("p = MatMul(x, m) y = Add(p, p)", False),
        ("p = MatMul(x, m) t = Add(p, b) y = Add(t, p)", False),
        ("t = Transpose<perm=[0,2,1]>(x) q = MatMul(x, t) p = MatMul(q, x) r = MatMul(p, m) y = Add(r, b)", True),
    ],
)
def test_a_float_product_adds_its_bias_itself(body: str, fused: bool) -> None:
    """As Hugging Face's model does it: what INT8 is compared with is not made slower than it need be."""
    text = HEAD.rstrip().removesuffix(">") + ", float[8,4] m = {" + ",".join(map(str, range(32))) + "}> {" + body + "}"
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    made = lowered(onnx_text.model(text), "g.onnx")
    assert any(step.op == LINEAR for step in made.program.steps) is fused
    expected = onnx_text.run(onnx_text.model(text), {"x": x})["y"]
    np.testing.assert_allclose(outputs(made, x), expected, rtol=1e-5, atol=1e-4)  # sums of some thousands in float32


def test_control_flow_is_refused() -> None:
    text = (
        "g (float[2,s,8] x, bool c) => (float[2,s,8] y) { y = If(c) <then_branch = t () => (float[2,s,8] a)"
        " { a = Abs(x) }, else_branch = e () => (float[2,s,8] d) { d = Neg(x) }> }"
    )
    with pytest.raises(EngineError, match="this engine does not know If"):
        lowered(onnx_text.model(text), "g.onnx")


@pytest.mark.parametrize("family", variants(tiny.FAMILIES, ("bert",), ("albert", "mpnet", "modernbert", "deberta-v2")))
def test_every_family_runs_all_planned_products_on_integers(family: str, tiny_graph: Callable[..., Path]) -> None:
    """In float16 as ONNX Runtime computes the same graph, which rounds in other places."""
    import torch

    file = tiny_graph(family, "inputs-outputs", "trt") / "model.onnx"
    made = lowered(load_graph(file), str(file))
    products = made.program.products
    per_block = len(set(products)) // tiny.LAYERS
    assert len(products) == tiny.LAYERS * per_block > 0
    assert all(product.two_four for product in products.values())
    assert sum(step.op == PRODUCT for step in made.program.steps) == len(products)
    executor = Executor(made.program, made.tensors, IntegerReferenceKernels())
    for batch, sequence, padding in ((1, 1, 0), (3, 7, 3), (2, tiny.POSITIONS, 5), (16, 5, 2)):
        feeds = baked.feeds(family, batch, sequence, padding=padding)
        given = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.no_grad():
            first = executor.run(given)["logits"].clone()
            executor.run(given)
            third = executor.run(given)["logits"]
        assert torch.equal(first, third)
        expected = onnx_text.run(file, feeds)["logits"]
        # Logits have a range of 1 to 7. In float16 a code moves by a step now and then, and a logit by .055 for it.
        # Most texts have no such code: the mean over 16 is .002 to .003.
        np.testing.assert_allclose(first.numpy(), expected, atol=0.1)
        if batch == 16:
            assert np.abs(first.numpy() - expected).mean() < 0.01


def test_int8_attention_is_rounded_to_its_grid_and_said_so(tmp_path: Path) -> None:
    from nxm_export.graph.exporter import export

    checkpoint = baked.write_checkpoint("bert", tmp_path / "c", placement="attention", attention="int8")
    export(checkpoint, tmp_path / "g", target="trt")
    made = lowered(load_graph(tmp_path / "g" / "model.onnx"), "g")
    assert made.program.attention == {"fused": 0, "in parts": 1, "operands on their INT8 grid": 1}


def test_weights_in_half_a_byte_are_read_as_their_codes(tmp_path: Path) -> None:
    from nxm_export.graph.exporter import export

    checkpoint = baked.write_checkpoint("bert", tmp_path / "c", spec="W4", task="classification")
    for stored in ("int8", "int4"):
        export(checkpoint, tmp_path / stored, target="trt", weights_stored=stored)
    one, other = (lowered(load_graph(tmp_path / stored / "model.onnx"), stored) for stored in ("int8", "int4"))
    assert one.program.products == other.program.products
    names = [product.weight for product in one.program.products.values()]
    assert len(names) == 6
    for name in names:
        np.testing.assert_array_equal(one.tensors[name].numpy(), other.tensors[name].numpy())


class TestFile:
    def test_a_program_comes_back_as_it_was(self, tiny_graph: Callable[..., Path]) -> None:
        import torch

        made = lowered(load_graph(tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"), "g")
        data = to_bytes(made.program, made.tensors)
        assert program_of(data, "x") == made.program
        back = tensors_of(data, "x")
        assert back.keys() == made.tensors.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in made.tensors.items())
        codes = [back[product.weight] for product in made.program.products.values()]
        assert all(tensor.dtype is torch.int8 for tensor in codes)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "no safetensors file"),
            (b"\xff" * 16, "no safetensors file|not JSON|header"),
            (b"\x02\0\0\0\0\0\0\0{}", "its header has no program"),
            (b'\x1f\0\0\0\0\0\0\0{"__metadata__": {"nxm": "{}"}}', "schema"),
        ],
    )
    def test_a_damaged_file_is_refused(self, data: bytes, message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            program_of(data, "model.safetensors")
