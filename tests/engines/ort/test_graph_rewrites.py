"""What the build does to a graph for ONNX Runtime: exact where it says exact, float rounding where it says so, and no
touch to graphs of another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest

from engines.base import BuildOptions
from engines.ort import backend as ort
from engines.ort.backend import LEFT_OUT, unsigned_activations
from engines.ort.graph_rewrites import FusedAttention, fused_attention, integer_products
from engines.passport import load_passport
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.graph.exporter import export
from nxm_export.graph.int4_storage import CAST, store_int4
from nxm_export.graph.reading.graph_weights import load_graph, save_graph
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import baked, onnx_text
from tests.support.variants import variants

T = TypeVar("T")
PLACEMENTS = ["inputs", "inputs-outputs"]
# Activations u8 (batch, 2) with scale 0.5 and zero point 128, weights s8 (2, 3) with a scale per column, a bias.
PRODUCT = """
g (float[batch, 2] x) => (float[batch, 3] y)
<float s = {0.5}, uint8 z = {128}, int8[2, 3] w = {1, -2, 127, 4, 5, -128}, float[3] ws = {1, 0.5, 0.25},
 int8[3] wz = {0, 0, 0}, float[3] bias = {1, -1, 0.5}>
{
  q = QuantizeLinear(x, s, z)
  a = DequantizeLinear(q, s, z)
  m = DequantizeLinear<axis = 1>(w, ws, wz)
  p = MatMul(a, m)
  y = Add(p, bias)
}
"""
# Two heads of 4 features, queries, keys and values alike, with a mask of padding and a bias.
MASKED_ATTENTION = """
g (float[batch, sequence, 8] x, int64[batch, sequence] mask, BIAS bias) => (float[batch, sequence, 8] y)
<int64[4] split = {0, 0, 2, 4}, int64[3] joined = {0, 0, 8}, int64[2] axes = {1, 2}, float one = {1},
 float padding = {-10000}, float scale = {0.5}>
{
  spread = Unsqueeze(mask, axes)
  ones = Cast<to = 1>(spread)
  inverse = Sub(one, ones)
  added = Mul(inverse, padding)
  xs = Reshape(x, split)
  q = Transpose<perm = [0, 2, 1, 3]>(xs)
  k = Transpose<perm = [0, 2, 3, 1]>(xs)
  s = MatMul(q, k)
  sc = Mul(s, scale)
  sb = Add(sc, bias)
  sm = Add(sb, added)
  p = Softmax<axis = -1>(sm)
  c = MatMul(p, q)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  y = Reshape(ct, joined)
}
"""
X = {"x": np.array([[1.0, -3.5], [70.0, 0.24], [-64.0, 63.5]], np.float32)}


def run_rewritten(
    graph: Path, feeds: Mapping[str, np.ndarray], rewrites: list[Callable[[ir.Model], T]], scratch: Path
) -> tuple[np.ndarray, list[T]]:
    """Logits after `rewrites` were applied to the graph, run node by node, and what each of them counted."""
    model = load_graph(graph)
    counts = [rewrite(model) for rewrite in rewrites]
    save_graph(model, scratch / "rewritten.onnx")
    return onnx_text.run(scratch / "rewritten.onnx", feeds)["logits"], counts


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unsigned_activations_change_no_bit(placement: str, tiny_graph: Callable[..., Path], tmp_path: Path) -> None:
    feeds, graph = baked.feeds("bert", 6, 11, padding=4), tiny_graph("bert", placement) / "model.onnx"
    signed, _ = run_rewritten(graph, feeds, [], tmp_path)
    unsigned, counts = run_rewritten(graph, feeds, [unsigned_activations], tmp_path)
    assert counts[0] > 0
    np.testing.assert_array_equal(unsigned, signed)


@pytest.mark.parametrize("family", variants(("bert", "roberta", "distilbert", "mpnet"), ("bert",)))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_integer_products_and_fused_attention_differ_by_float_rounding_alone(
    placement: str, family: str, tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    feeds, graph = baked.feeds(family, 6, 11, padding=4), tiny_graph(family, placement) / "model.onnx"
    plain, _ = run_rewritten(graph, feeds, [unsigned_activations], tmp_path)
    products, counts = run_rewritten(graph, feeds, [unsigned_activations, integer_products], tmp_path)
    assert counts[1] == 12
    rewrites: list[Callable[[ir.Model], object]] = [unsigned_activations, integer_products, fused_attention]
    everything, found = run_rewritten(graph, feeds, rewrites, tmp_path)
    assert found[2] == FusedAttention(2, 0, 0)
    for actual in (products, everything):
        # Rounding leaves most samples alone; where it moves a code by one step, these logits move by some 0.05 at most.
        close = np.abs(actual - plain).max(axis=1) < 1e-5
        assert close.mean() >= 0.5
        np.testing.assert_allclose(actual, plain, atol=0.1)


def test_a_product_of_codes_is_what_the_pairs_say() -> None:
    """Numbers chosen so that float arithmetic is exact, so both forms agree to the last bit; the last row clips."""
    plain, fused = onnx_text.model(PRODUCT), onnx_text.model(PRODUCT)
    assert integer_products(fused) == 1
    assert [node.op_type for node in fused.graph] == ["QuantizeLinear", "MatMulIntegerToFloat"]
    expected = onnx_text.run(plain, X)["y"]
    np.testing.assert_array_equal(onnx_text.run(fused, X)["y"], expected)
    assert expected[0].tolist() == [1.0 - 4 * 3.5 + 1, -1 - 2.5 * 3.5 - 1, 31.75 + 32 * 3.5 + 0.5]


def test_a_product_that_is_added_to_itself_has_no_bias() -> None:
    plain, fused = (onnx_text.model(PRODUCT.replace("Add(p, bias)", "Add(p, p)")) for _ in range(2))
    assert integer_products(fused) == 1
    assert [node.op_type for node in fused.graph] == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
    np.testing.assert_array_equal(onnx_text.run(fused, X)["y"], onnx_text.run(plain, X)["y"])


# A product between two pairs, by float weights or codes of a scale of 0.5; its bias is no multiple of both scales.
BETWEEN_PAIRS = """
g (float[batch, 2] x) => (float[batch, 3] y)
<float s = {0.5}, uint8 z = {128}, float t = {0.0625}, int8[3, 2] w = {1, -1, 0, 1, -1, 0},
 float[3] ws = {0.5, 0.5, 0.5}, int8[3] wz = {0, 0, 0}, float[3, 2] wf = {0.5, -0.3, 0.1, 0.7, -0.9, 0.2},
 float[3] bias = {0.1, -0.1, 0.33}>
{
  q = QuantizeLinear(x, s, z)
  a = DequantizeLinear(q, s, z)
  m = DequantizeLinear<axis = 0>(w, ws, wz)
  PRODUCT
  o = QuantizeLinear(p, t, z)
  y = DequantizeLinear(o, t, z)
}
"""
GEMM = "p = Gemm<transB = 1>(a, m, bias)"


@pytest.mark.parametrize("product", [GEMM, GEMM.replace("m, bias", "wf, bias"), GEMM.replace("m, bias", "wf")])
def test_an_engine_rounds_no_bias_and_no_float_weight(product: str, tmp_path: Path) -> None:
    file = onnx_text.save(BETWEEN_PAIRS.replace("PRODUCT", product), tmp_path / "m.onnx")
    (tmp_path / "engine").mkdir()
    passport = ort.build(file, tmp_path / "engine", BuildOptions(threads=1))
    session = ort.open_session(tmp_path / "engine" / ort.ENGINE_FILE, 1, ort.left_out(passport))
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)}
    np.testing.assert_array_equal(session.run(None, feeds)[0], onnx_text.run(file, feeds)["y"])


def test_int4_codes_that_are_cast_to_int8_are_multiplied_as_integers(tmp_path: Path) -> None:
    text = PRODUCT.replace("int8[2, 3] w = {1, -2, 127, 4, 5, -128}", "int8[2, 3] w_quantized = {1, -2, 7, 4, 5, -8}")
    text = text.replace("(w, ws, wz)", "(w_quantized, ws, wz)")
    plain, fused = onnx_text.model(text), onnx_text.model(text)
    store_int4(fused.graph, ["w"], CAST)
    assert integer_products(fused) == 1
    assert [node.op_type for node in fused.graph] == ["QuantizeLinear", "Cast", "MatMulIntegerToFloat"]
    np.testing.assert_array_equal(onnx_text.run(fused, X)["y"], onnx_text.run(plain, X)["y"])
    ort.open_session(onnx_text.save(fused, tmp_path / "m.onnx"), 1, LEFT_OUT, optimized=tmp_path / "optimized.onnx")
    optimized = load_graph(tmp_path / "optimized.onnx").graph
    assert [node.op_type for node in optimized] == ["QuantizeLinear", "MatMulIntegerToFloat"]  # cast once, at the load


@pytest.mark.parametrize("cast", ["Cast<to = 3>(u)", "Cast<to = 3>(v)", "Cast<to = 2>(w)"])
def test_a_product_of_what_is_cast_in_another_way_is_left_alone(cast: str) -> None:
    """From UINT4, from an input of the graph, to UINT8."""
    text = PRODUCT.replace("m = DequantizeLinear<axis = 1>(w,", f"c = {cast}\n  m = DequantizeLinear<axis = 1>(c,")
    text = text.replace("int8[2, 3] w = {1, -2, 127, 4, 5, -128}", "int4[2, 3] w = {1}, uint4[2, 3] u = {1}")
    assert integer_products(onnx_text.model(text.replace("float[batch, 2] x", "float[batch, 2] x, int4[2, 3] v"))) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uint8 z = {128}", "int8 z = {0}"),
        ("int8[3] wz = {0, 0, 0}", "int8[3] wz = {0, 1, 0}"),
        ("<axis = 1>(w, ws, wz)", "<axis = 0>(w, k, kz)"),
        ("p = MatMul(a, m)", "p = MatMul(x, m)"),
    ],
    ids=["signed activations", "a weight's zero point", "scales along K", "a float activation"],
)
def test_products_of_another_form_are_left_alone(old: str, new: str) -> None:
    text = PRODUCT.replace(old, new).replace("float[3] bias", "float[2] k = {1, 2}, int8[2] kz = {0, 0}, float[3] bias")
    model = onnx_text.model(text)
    assert integer_products(model) == 0
    assert "MatMul" in [node.op_type for node in model.graph]


def test_a_bias_that_others_read_or_that_is_no_row_stays_outside() -> None:
    model = onnx_text.model(PRODUCT.replace("float[3] bias = {1, -1, 0.5}", "float[1, 3] bias = {1, -1, 0.5}"))
    assert integer_products(model) == 1
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
    plain = onnx_text.model(PRODUCT.replace("float[3] bias = {1, -1, 0.5}", "float[1, 3] bias = {1, -1, 0.5}"))
    np.testing.assert_array_equal(onnx_text.run(model, X)["y"], onnx_text.run(plain, X)["y"])


def test_attention_with_another_mask_is_left_alone(tiny_graph: Callable[..., Path]) -> None:
    """The fused operator is told one value for padding; a graph that adds another keeps its own operators."""
    model = load_graph(tiny_graph("bert", "inputs") / "model.onnx")
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None and np.all(value.const_value.numpy() == -1e4):
                half = ir.tensor(np.float32(-5e3), name="half")
                new = ir.Value(name="half", const_value=half, type=value.type, shape=ir.Shape([]))
                model.graph.register_initializer(new)
                node.replace_input_with(index, new)
    assert fused_attention(model) == FusedAttention(0, 0, 2)


@pytest.mark.parametrize("bias", ["float[1, 2, sequence, sequence]", "float[batch, 1, sequence, sequence]", None])
@pytest.mark.parametrize("onnx_attention", [True, False])
def test_fused_attention_gives_padding_and_biases_what_the_plain_operators_do(
    bias: str | None, onnx_attention: bool
) -> None:
    text = MASKED_ATTENTION.replace("BIAS", bias or "float[1, 1, 1, 1]")
    text = text if bias else text.replace("sb = Add(sc, bias)", "sb = Identity(sc)")
    plain, fused = onnx_text.model(text, opset=20), onnx_text.model(text, opset=20)
    for model in (plain, fused):
        passes.IdentityEliminationPass()(model)
        passes.ShapeInferencePass()(model)
    assert fused_attention(fused, onnx_attention=onnx_attention) == FusedAttention(1, 0, 0)
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 0, 0], [0] * 5, [1] * 5])  # of one row everything is padding
    sizes = {"float[1, 2, sequence, sequence]": (1, 2, 5, 5), "float[batch, 1, sequence, sequence]": (3, 1, 5, 5)}
    feeds = {
        "x": rng.standard_normal((3, 5, 8)).astype(np.float32),
        "mask": mask,
        "bias": rng.standard_normal(sizes.get(bias or "", (1, 1, 1, 1))).astype(np.float32),
    }
    actual, expected = (onnx_text.run(model, feeds)["y"] for model in (fused, plain))
    np.testing.assert_allclose(actual[[0, 2]], expected[[0, 2]], atol=2e-6)  # float rounding, values of about 1
    np.testing.assert_allclose(
        actual[1], expected[1], atol=2e-3
    )  # its scores are -1e4 and what is left of a bias there
    assert not np.allclose(onnx_text.run(plain, {**feeds, "mask": np.ones_like(mask)})["y"], expected, atol=0.05)


@pytest.mark.parametrize(
    ("opset", "also", "operator"),
    [
        (20, "", "Attention"),
        (22, "", "Attention"),
        (19, "", "MultiHeadAttention"),
        (20, "GroupNormalization", "MultiHeadAttention"),
    ],
)
def test_a_graph_gets_the_operator_that_its_opset_can_be_raised_to(opset: int, also: str, operator: str) -> None:
    """GroupNormalization is what reads otherwise in opset 21."""
    model = onnx_text.model(MASKED_ATTENTION.replace("BIAS", "float[1, 2, sequence, sequence]"), opset=20)
    passes.ShapeInferencePass()(model)
    model.opset_imports[""] = opset
    if also:
        x = model.graph.inputs[0]
        model.graph.append(ir.node(also, [x, x, x], attributes={"num_groups": 1}))
        model.graph.outputs.append(model.graph[-1].outputs[0])
    assert fused_attention(model) == FusedAttention(1, 0, 0)
    assert [node.op_type for node in model.graph if "Attention" in node.op_type] == [operator]
    assert model.opset_imports[""] == (23 if operator == "Attention" else opset)


@pytest.mark.parametrize(("installed", "asked"), [("1.22.1", None), ("1.32.0", "1.19"), ("1.32.0", "1.19.2")])
def test_a_runtime_without_the_operator_gets_its_own(
    installed: str,
    asked: str | None,
    tiny_graph: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", installed)
    graph, options = tiny_graph("bert", "inputs") / "model.onnx", BuildOptions(oldest_onnxruntime=asked)
    build_engine(graph, tmp_path / "engine", "ort", options=options)
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    assert ort.inspect(tmp_path / "engine").operators["MultiHeadAttention"] == 2
    assert load_passport(tmp_path / "engine").options["onnx_attention"] == 0
    ort.load(tmp_path / "engine").close()


def test_an_older_runtime_is_told_what_the_engine_wants(
    tiny_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    directory = tiny_engine("ort")
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    for use in (ort.load, ort.inspect):
        with pytest.raises(
            EngineUnavailable, match=r"wants onnxruntime 1\.24 or later, and 1\.19 is installed; upgrade"
        ):
            use(directory)


@pytest.mark.parametrize("version", ["", "1", "new", "1.19.2.3", "-1.2"])
def test_what_is_no_version_of_a_runtime_is_refused(
    version: str, tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="is no version of onnxruntime; give it as"):
        build_engine(
            tiny_graph("bert", "inputs"), tmp_path / "e", "ort", options=BuildOptions(oldest_onnxruntime=version)
        )
    assert not (tmp_path / "e").exists()


def test_the_engine_says_what_was_done_to_its_graph(tiny_engine: Callable[..., Path]) -> None:
    directory = tiny_engine("ort")
    options = load_passport(directory).options
    assert options["integer_products"] == 12
    assert (options["fused_attention"], options["rotary_attention"], options["plain_attention"]) == (2, 0, 0)
    assert options["onnx_attention"] == 2
    assert options["disabled_optimizers"] == list(LEFT_OUT)
    facts = ort.inspect(directory)
    operators = facts.operators
    assert operators["Attention"] == facts.fused_attention == 2
    assert facts.plain_attention == 0
    assert not {"SkipLayerNormalization", "BiasGelu"} & set(operators)


def test_attention_on_integers_is_said_to_be_plain(tmp_path: Path) -> None:
    """Its products are between quantizers, which the fused operator has no place for."""
    path = baked.write_checkpoint("bert", tmp_path / "c", placement="attention", attention="int8")
    export(path, tmp_path / "graph", placement="attention")
    build_engine(tmp_path / "graph", tmp_path / "engine", "ort")
    options, facts = load_passport(tmp_path / "engine").options, ort.inspect(tmp_path / "engine")
    assert (options["fused_attention"], options["plain_attention"]) == (0, 1)
    assert (facts.fused_attention, facts.plain_attention) == (0, 1)
